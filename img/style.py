"""What all of the tutorial's figures have in common: colors, fonts, line widths, and a dict of the functions that draw
them."""
import matplotlib

matplotlib.use('Agg')  # draws into files, without a screen
import matplotlib.pyplot as plt  # noqa: E402

paper, ink, faint = 'white', '#1f2328', '#8a8f98'  # background, text and outlines, what does not matter
# Chosen so that color-blind readers can tell them apart, as in a simulation (Machado et al., 2009).
object_color, prior_color, prediction_color, wrong_color = '#12b886', '#2f6fdf', '#f59f00', '#a3123a'
series = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')  # one for each of the six feature maps
width = 6.4  # inches, drawn as wide as the text: with letters of 12 points still legible on a phone

plt.rcParams.update({
    'figure.facecolor': paper, 'savefig.facecolor': paper, 'axes.facecolor': paper, 'figure.dpi': 150,
    'savefig.dpi': 150, 'font.family': 'DejaVu Sans', 'font.size': 12, 'axes.titlesize': 13, 'text.color': ink,
    'axes.labelcolor': ink, 'axes.edgecolor': ink, 'xtick.color': ink, 'ytick.color': ink, 'lines.linewidth': 2,
    'axes.linewidth': 1, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
    'svg.fonttype': 'path', 'svg.hashsalt': 'ssd300'})  # the same drawing gives the same file

figures = {}  # file name -> function that draws it


def figure(name):
    """
    Enter a function into `figures`. It returns a matplotlib figure, a PIL image, or, for a .gif, a
    list of (PIL image, milliseconds).

    :param name: the figure's file name
    """
    def enter(draw):
        figures[name] = draw
        return draw
    return enter
