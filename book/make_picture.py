"""Draw the picture at the head of README.md, from the shipped model: python book/make_picture.py (part of `make refresh`)."""

from pathlib import Path

import matplotlib.pyplot as plt

import mmn
from mmn import plots, scenes

SEED, TARGET = 0, "lion"  # the tour's own


def main() -> None:
    """Write book/_static/tour.png."""
    vlm = mmn.load("tiny-llava")
    image = scenes.draw(SEED).image
    trace = vlm.caption(image)
    rankings = mmn.rank(vlm, trace, k=10)
    noun, ranking = next(iter(rankings.items()))
    pictures = [image, *(scenes.draw(number, concepts=[noun]).image for number in (101, 102, 103))]
    edit = mmn.Edit.fit(vlm, pictures, noun, TARGET, ranking.neurons, progress=False)
    with edit.applied(vlm):
        edited = vlm.caption(image, record=False)
    figure = plt.figure(figsize=(9, 4.6), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=[3.2, 1])
    axes = upper.subplots(1, 1 + len(rankings))
    plots.picture(image, axes[0], "the picture")
    for ax, (name, found) in zip(axes[1:], rankings.items(), strict=True):
        heat = mmn.heatmap(vlm, trace, found.neurons)
        plots.heatmap(image, heat.on_image(), heat.mask(), ax, f"where the neurons of {name!r} fire")
    plots.caption_change(trace.text, edited.text, lower.subplots(), names=("before", "edited"))
    figure.savefig(Path(__file__).parent / "_static" / "tour.png", dpi=100)


if __name__ == "__main__":
    main()
