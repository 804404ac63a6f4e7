"""What all of the tutorial's figures have in common: colors, fonts, line widths, what draws them, and a dict of the
functions that draw each of them.
"""
import matplotlib
import numpy as np
from matplotlib.colors import get_named_colors_mapping, to_hex
from matplotlib.lines import Line2D
from PIL import Image, ImageColor

matplotlib.use('Agg')  # draws into files, without a screen
import matplotlib.pyplot as plt

# From here on, matplotlib knows these colors by name. The last four were chosen so that color-blind readers can tell
# them apart, as in a simulation (Machado et al., 2009).
get_named_colors_mapping().update({
    'ink': '#1f2328', 'faint': '#8a8f98',  # text and outlines; what does not matter
    'object': '#12b886', 'prior': '#2f6fdf', 'prediction': '#f59f00', 'wrong': '#a3123a'})
series = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')  # one for each of the six feature maps
small = 11  # points: no letters are smaller
dashes = (0, (4, 3))  # of lines: four line widths on, three off
width = 6.4  # inches, drawn as wide as the text: with letters of 12 points still legible on a phone

plt.rcParams.update({
    'figure.facecolor': 'white', 'savefig.facecolor': 'white', 'axes.facecolor': 'white', 'figure.dpi': 150,
    'savefig.dpi': 150, 'font.family': 'DejaVu Sans', 'font.size': 12, 'axes.titlesize': 13, 'text.color': 'ink',
    'axes.labelcolor': 'ink', 'axes.edgecolor': 'ink', 'xtick.color': 'ink', 'ytick.color': 'ink',
    'lines.linewidth': 2, 'axes.linewidth': 1, 'axes.spines.top': False, 'axes.spines.right': False,
    'legend.frameon': False, 'svg.fonttype': 'path', 'svg.hashsalt': 'ssd300'})  # the same drawing, the same file

figures = {}  # file name -> function that draws it


def figure(name):
    """Enter a function into `figures` under a file name. It returns a matplotlib figure, a PIL image, or, for a .gif, a
    list of (PIL image, milliseconds)."""
    def enter(draw):
        figures[name] = draw
        return draw
    return enter


def panels(rows, columns, height, **options):
    """A figure `height` inches high, and its axes as a flat list. Options are those of plt.subplots."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout='constrained', squeeze=False, **options)
    return fig, list(axes.flat)


def canvas(height):
    """An empty drawing, measured in tenths of an inch with y downward as in images: 64 wide and `height` high."""
    drawing = plt.figure(figsize=(width, height / 10))
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(height, 0))
    axes.axis('off')
    return drawing, axes


def show(axes, image, title='', window=(0, 0, 1, 1)):
    """Stretch a PIL image over the square from 0 to 1, at its own aspect ratio, so that boxes on it are in fractions.
    Only what is in the window is seen, and white where it reaches over the image's edge."""
    x_min, y_min, x_max, y_max = window
    axes.imshow(image, extent=(0, 1, 1, 0), aspect=image.height / image.width)
    axes.set(xlim=(x_min, x_max), ylim=(y_max, y_min))
    axes.axis('off')
    axes.set_title(title, fontsize=12, pad=5)


def rendered(fig):
    """:return: the figure as a PIL image of the 256 colors that fit best, which makes a small file"""
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert('RGB')
    plt.close(fig)
    return image.quantize(256, kmeans=5, dither=Image.Dither.NONE)


def write(axes, x, y, text, plate=None, **options):
    """Text centered at a point, unless options say otherwise; with a plate of some color behind it, if it has one."""
    if plate:
        dark = ImageColor.getcolor(to_hex(plate), 'L') < 128
        on_plate = {'color': 'white' if dark else 'ink', 'zorder': 5,
                    'bbox': {'facecolor': plate, 'edgecolor': 'none', 'pad': 1.5}}
        options = on_plate | options
    axes.text(x, y, text, **{'ha': 'center', 'va': 'center', 'fontsize': small} | options)


def block(axes, x, y, w, h, text='', fill='white', edge='ink', linewidth=1, **options):
    """A rectangle with its upper left corner at (x, y), and text in its middle."""
    axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge, linewidth=linewidth))
    write(axes, x + w / 2, y + h / 2, text, **options)


def arrow(axes, start, end, color='ink', style='-|>'):
    """A straight arrow between two points."""
    axes.annotate('', end, start, arrowprops={'arrowstyle': style, 'color': color, 'linewidth': 1.5, 'shrinkA': 0,
                                              'shrinkB': 0, 'mutation_scale': 13})


def table(axes, x, y, rows, cell, fills, **options):
    """Rows of texts in a grid of cells with its upper left corner at (x, y); `fills` has a color for each."""
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            block(axes, x + j * cell[0], y + i * cell[1], *cell, text, fills[i][j], linewidth=0.8, **options)


def grid(axes, x, y, side, size, color, linewidth):
    """The tiles of a feature map, `size` in a row, as a square with its upper left corner at (x, y)."""
    for offset in np.linspace(0, side, size + 1):
        axes.plot([x + offset] * 2, [y, y + side], [x, x + side], [y + offset] * 2, color=color, linewidth=linewidth)


def outline(axes, boxes, color, text='', at='top left', **options):
    """Draw a box, or several.

    :param boxes: boundary coordinates, of the image or the canvas, (4) or (n, 4)
    :param text: written on a plate of the box's color in one of its corners, or above or below the box
    :param at: where: 'top', 'bottom', 'above' or 'below', and 'left' or 'right'
    :param options: of matplotlib's Rectangle"""
    options = {'facecolor': 'none', 'edgecolor': color, 'linewidth': 2, 'zorder': 3} | options
    vertical, horizontal = at.split()
    for x_min, y_min, x_max, y_max in np.asarray(boxes).reshape(-1, 4).tolist():
        axes.add_patch(plt.Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, **options))
        if text:
            x, y = x_min if horizontal == 'left' else x_max, y_min if vertical in ('top', 'above') else y_max
            write(axes, x, y, text, color, ha=horizontal, va='top' if vertical in ('top', 'below') else 'bottom')


def legend(fig, colors, **options):
    """Say below a figure what the colors of its boxes mean: a dict of text -> color. Options are matplotlib's."""
    lines = [Line2D([], [], color=color) for color in colors.values()]
    fig.legend(lines, list(colors), loc='outside lower center', ncols=len(lines), borderaxespad=0, **options)
