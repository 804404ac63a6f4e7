"""What all of the tutorial's figures have in common: colors, fonts, line widths, what draws them, and a dict of the
functions that draw each of them.
"""
import matplotlib
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D
from PIL import Image, ImageColor

matplotlib.use('Agg')  # draws into files, without a screen
import matplotlib.pyplot as plt

paper, ink, faint = 'white', '#1f2328', '#8a8f98'  # background, text and outlines, what does not matter
# Chosen so that color-blind readers can tell them apart, as in a simulation (Machado et al., 2009).
object_color, prior_color, prediction_color, wrong_color = '#12b886', '#2f6fdf', '#f59f00', '#a3123a'
series = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')  # one for each of the six feature maps
small = 11  # points: no letters are smaller
dashes = (0, (4, 3))  # of lines: four line widths on, three off
width = 6.4  # inches, drawn as wide as the text: with letters of 12 points still legible on a phone

plt.rcParams.update({
    'figure.facecolor': paper, 'savefig.facecolor': paper, 'axes.facecolor': paper, 'figure.dpi': 150,
    'savefig.dpi': 150, 'font.family': 'DejaVu Sans', 'font.size': 12, 'axes.titlesize': 13, 'text.color': ink,
    'axes.labelcolor': ink, 'axes.edgecolor': ink, 'xtick.color': ink, 'ytick.color': ink, 'lines.linewidth': 2,
    'axes.linewidth': 1, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
    'svg.fonttype': 'path', 'svg.hashsalt': 'ssd300'})  # the same drawing gives the same file

figures = {}  # file name -> function that draws it


def figure(name):
    """Enter a function into `figures`. It returns a matplotlib figure, a PIL image, or, for a .gif, a
    list of (PIL image, milliseconds).

    :param name: the figure's file name"""
    def enter(draw):
        figures[name] = draw
        return draw
    return enter


# ------------------------------------------------------------------------------------------- Diagrams and charts
# A canvas is measured in tenths of an inch, with y downward as in images.

def canvas(height):
    """An empty drawing, 64 tenths of an inch wide and `height` high."""
    drawing = plt.figure(figsize=(width, height / 10))
    axes = drawing.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10 * width), ylim=(height, 0))
    axes.axis('off')
    return drawing, axes


def charts(height, columns=1):
    """Axes side by side, in a figure `height` tenths of an inch high."""
    return plt.subplots(1, columns, figsize=(width, height / 10), layout='constrained')


def tint(color, strength=0.25):
    """A color mixed with white."""
    red, green, blue, _ = to_rgba(color)
    return tuple(1 - strength * (1 - value) for value in (red, green, blue))


def write(axes, x, y, text, **options):
    """Text centered at a point, unless options say otherwise."""
    return axes.text(x, y, text, **{'ha': 'center', 'va': 'center', 'fontsize': small, **options})


def block(axes, x, y, w, h, text='', fill=paper, edge=ink, linewidth=1, **options):
    """A rectangle with its upper left corner at (x, y), and text in its middle."""
    axes.add_patch(plt.Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge, linewidth=linewidth))
    write(axes, x + w / 2, y + h / 2, text, **options)


def arrow(axes, start, end, color=ink):
    """A straight arrow between two points."""
    axes.annotate('', end, start, arrowprops={'arrowstyle': '-|>', 'color': color, 'linewidth': 1.5, 'shrinkA': 0,
                                              'shrinkB': 0, 'mutation_scale': 13})


def table(axes, x, y, rows, cell, fills, **options):
    """Rows of texts in a grid of cells with its upper left corner at (x, y); `fills` has a color for each."""
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            block(axes, x + j * cell[0], y + i * cell[1], *cell, text, fills[i][j], linewidth=0.8, **options)


# -------------------------------------------------------------------------------------------------------- Photographs
# `show` stretches an image over the square from 0 to 1, at the image's own aspect ratio: boxes are in fractions.

def panels(rows, columns, height, row_heights=None, column_widths=None):
    """:param height: of the figure, in inches
    :param row_heights: of the rows, in proportion to each other
    :param column_widths: of the columns, likewise
    :return: a figure, and its axes as a flat list"""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout='constrained', squeeze=False,
                             height_ratios=row_heights, width_ratios=column_widths)
    return fig, list(axes.flat)


def show(ax, image, title='', window=(0, 0, 1, 1)):
    """Draw an image.

    :param image: a PIL image
    :param window: the part to show, fractional boundary coordinates; white where it reaches over the image's edge"""
    x_min, y_min, x_max, y_max = window
    ax.imshow(image, extent=(0, 1, 1, 0), aspect=image.height / image.width)
    ax.set(xlim=(x_min, x_max), ylim=(y_max, y_min))
    ax.axis('off')
    ax.set_title(title, fontsize=12, pad=5)


def outline(ax, box, color, text='', at='top left', **options):
    """Draw a box.

    :param box: boundary coordinates, of the image or the canvas
    :param text: written on a plate of the box's color in one of its corners, or above or below the box
    :param at: where: 'top', 'bottom', 'above' or 'below', and 'left' or 'right'
    :param options: of matplotlib's Rectangle"""
    x_min, y_min, x_max, y_max = map(float, box)
    options = {'facecolor': 'none', 'edgecolor': color, 'linewidth': 2, 'zorder': 3} | options
    ax.add_patch(plt.Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, **options))
    if text:
        vertical, horizontal = at.split()
        x, y = x_min if horizontal == 'left' else x_max, y_min if vertical in ('top', 'above') else y_max
        write_on_plate(ax, x, y, text, color, ha=horizontal, va='top' if vertical in ('top', 'below') else 'bottom')


def outline_all(ax, boxes, color, **options):
    """Draw many boxes, see `outline`."""
    for box in boxes:
        outline(ax, box, color, **options)


def write_on_plate(ax, x, y, text, color, **options):
    """Write on a plate of a color, in dark letters if it is bright."""
    options = {'ha': 'left', 'va': 'top'} | options
    on_plate = paper if ImageColor.getcolor(color, 'L') < 128 else ink
    ax.text(x, y, text, color=on_plate, fontsize=small, zorder=5,
            bbox={'facecolor': color, 'edgecolor': 'none', 'pad': 1.5}, **options)


def grid(ax, size, color=paper, **options):
    """Draw the tiles of a feature map over an image."""
    for line in range(size + 1):
        ax.plot([line / size] * 2, [0, 1], color=color, **options)
        ax.plot([0, 1], [line / size] * 2, color=color, **options)


def legend(fig, colors, **options):
    """Say below a figure what the colors of its boxes mean.

    :param colors: dict of text -> color
    :param options: of matplotlib's legend"""
    lines = [Line2D([], [], color=color) for color in colors.values()]
    fig.legend(lines, list(colors), loc='outside lower center', ncols=len(lines), borderaxespad=0, **options)


def rendered(fig):
    """:return: the figure as a PIL image of the 256 colors that fit best, which makes a small file"""
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert('RGB')
    plt.close(fig)
    return image.quantize(256, kmeans=5, dither=Image.Dither.NONE)
