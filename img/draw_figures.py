"""Draw the tutorial's figures with the project's own functions:

    python img/draw_figures.py                          # all of them
    python img/draw_figures.py priors.png offsets.png   # only these
"""
import os
import sys

folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [folder, os.path.dirname(folder)]

import cells  # noqa: E402, F401
import diagrams  # noqa: E402, F401
import photographs  # noqa: E402, F401
from drawing import figures, plt  # noqa: E402


def save(name, drawing):
    """Save what a function in `figures` returned under the figure's file name."""
    path = os.path.join(folder, name)
    if name.endswith('.gif'):
        (first, *others), durations = zip(*drawing)
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0)
    elif isinstance(drawing, plt.Figure):
        drawing.savefig(path, metadata={'Date': None} if name.endswith('.svg') else {})
        plt.close(drawing)
    else:
        drawing.save(path, optimize=True)
    print(f'{name}: {os.path.getsize(path) / 1024:.0f} KB', flush=True)


def main():
    """Draw the figures named on the command line, or all."""
    names = sys.argv[1:] or list(figures)
    unknown = sorted(set(names) - set(figures))
    if unknown:
        sys.exit(f'Error: no figure is named {unknown}: there are {sorted(figures)}')
    for name in names:
        save(name, figures[name]())


if __name__ == '__main__':
    main()
