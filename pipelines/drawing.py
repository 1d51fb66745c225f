"""Pictures for a person's eye: frames and curves of a dataset, a run's curves, what its policy does."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from PIL import Image, ImageDraw, ImageFont

from pipelines.inspection import Look, counted, spread
from pipelines.predictions import Predictions
from pipelines.sources.mapping import CAMERA_PREFIX

TILE_PX = 220
"""Side of the square that every image is fitted into."""
SAMPLE_PX = 384
"""Larger side of the largest image of a sample."""
GAP_PX = 6
MARGIN_PX = 18
LABEL_PX = 26
"""Width of the camera's name, which stands upright left of its images."""
INK, GREY, MISSING = "#1b1f24", "#5b6470", "#c0392b"
STATE_COLOUR, ACTION_COLOUR = "#1f6fb4", "#d9730d"
PANELS_ACROSS = 4
HISTOGRAM_BINS = 50
CHARACTERS_A_PANEL = 40
"""Of the title's type, above one panel."""
SHOWN_CHUNKS = 4
MOST_ACTIONS = 16
RUN_PANELS = {
    "loss": ("train/loss", "val/loss", "val/loss_ema"),
    "error of the action on held-out frames, normalised": (
        "val/action_mae/1",
        "val/action_mae/10",
        "val/action_mae/all",
    ),
    "learning rate": ("train/lr",),
    "gradient norm": ("train/grad_norm",),
    "samples a second": ("data/samples_per_s",),
    "share of the time waiting for data": ("data/wait_share",),
}
"""Of a run's picture: title -> metrics."""
FROM_ZERO = {
    "error of the action on held-out frames, normalised": 0.0,
    "samples a second": 0.0,
    "share of the time waiting for data": 0.1,
}
"""Panels whose axis begins at 0, and how far it goes at least."""
CURVE_COLOURS = (STATE_COLOUR, ACTION_COLOUR, MISSING)
MOST_PANELS = 64
"""More numbers than these are left out of the figure, whose title says so."""


# --- the contact sheet ---


def contact_sheet(looks: Sequence[Look], *, title: str, fps: float) -> Image.Image:
    """Draw a band for every episode: its instruction, then a line of images for every camera."""
    moments = max(len(look.frames) for look in looks)
    width = 2 * MARGIN_PX + LABEL_PX + moments * (TILE_PX + GAP_PX) - GAP_PX
    bands = [_band(look, width=width, fps=fps) for look in looks]
    title_font = _font(20, bold=True)
    top = MARGIN_PX + 38
    sheet = Image.new("RGB", (width, top + sum(band.height for band in bands) + MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (MARGIN_PX, MARGIN_PX), _shortened(title, title_font, width - 2 * MARGIN_PX), INK, font=title_font
    )
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    return sheet


def sample_card(images: Mapping[str, np.ndarray], *, task: str, place: str) -> Image.Image:
    """Draw a sample's images, each (h, w, 3) uint8, side by side, and its instruction."""
    tiles = {name: Image.fromarray(np.ascontiguousarray(image)) for name, image in images.items()}
    scale = SAMPLE_PX / max(max(tile.size) for tile in tiles.values())
    if scale > 1:  # small ones are enlarged, pixel by pixel: what the model is given is not smoother
        sizes = {
            name: (round(tile.width * scale), round(tile.height * scale)) for name, tile in tiles.items()
        }
        tiles = {name: tile.resize(sizes[name], Image.Resampling.NEAREST) for name, tile in tiles.items()}
    width = sum(tile.width + GAP_PX for tile in tiles.values()) - GAP_PX + 2 * MARGIN_PX
    height = max(tile.height for tile in tiles.values())
    card = Image.new("RGB", (width, height + 92), "white")
    draw = ImageDraw.Draw(card)
    draw.text(
        (MARGIN_PX, 10),
        _shortened(task, _font(18, bold=True), width - 2 * MARGIN_PX),
        INK,
        _font(18, bold=True),
    )
    draw.text((MARGIN_PX, 36), place, GREY, font=_font(13))
    left = MARGIN_PX
    for name, tile in tiles.items():
        card.paste(tile, (left, 58))
        label = _shortened(name.removeprefix(CAMERA_PREFIX), _font(13), tile.width)
        draw.text((left, 62 + height), label, GREY, font=_font(13))
        left += tile.width + GAP_PX
    return card


def _band(look: Look, *, width: int, fps: float) -> Image.Image:
    heights = {camera: _tile_height(images) for camera, images in look.images.items()}
    caption_px, header_px = 22, 34
    height = header_px + sum(tile + caption_px for tile in heights.values()) + 14
    band = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(band)
    draw.line([(MARGIN_PX, 4), (width - MARGIN_PX, 4)], fill="#d0d5da")
    head = f"episode {look.episode}   {counted(look.num_frames, 'frame')}, {look.num_frames / fps:.1f} s   "
    draw.text((MARGIN_PX, 12), head, INK, font=_font(15, bold=True))
    left = MARGIN_PX + _font(15, bold=True).getlength(head)
    told = " | ".join(look.tasks)
    draw.text((left, 12), _shortened(told, _font(15), width - MARGIN_PX - left), INK, font=_font(15))
    top = header_px
    for camera, images in look.images.items():
        label = _upright(camera.removeprefix(CAMERA_PREFIX), length=heights[camera])
        band.paste(label, (MARGIN_PX, top))
        for place, (frame, image) in enumerate(zip(look.frames, images, strict=True)):
            left = MARGIN_PX + LABEL_PX + place * (TILE_PX + GAP_PX)
            band.paste(_tile(image, height=heights[camera]), (left, top))
            caption = f"{frame / fps:.1f} s   frame {frame}"
            draw.text((left, top + heights[camera] + 2), caption, GREY, font=_font(12))
        top += heights[camera] + caption_px
    return band


def _tile_height(images: Sequence[Image.Image | None]) -> int:
    sizes = [_fitted(image)[1] for image in images if image is not None]
    return max(sizes, default=TILE_PX // 2)


def _fitted(image: Image.Image) -> tuple[int, int]:
    scale = TILE_PX / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


def _tile(image: Image.Image | None, *, height: int) -> Image.Image:
    if image is not None:
        return image.resize(_fitted(image), Image.Resampling.BICUBIC)
    tile = Image.new("RGB", (TILE_PX, height), "#fdecea")
    ImageDraw.Draw(tile).text(
        (TILE_PX // 2, height // 2), "unreadable", MISSING, font=_font(15, bold=True), anchor="mm"
    )
    return tile


def _upright(text: str, *, length: int) -> Image.Image:
    label = Image.new("RGB", (length, LABEL_PX), "white")
    font = _font(13)
    ImageDraw.Draw(label).text(
        (length // 2, LABEL_PX // 2), _shortened(text, font, length), GREY, font=font, anchor="mm"
    )
    return label.rotate(90, expand=True)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text to one line of at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} ...") > width:
        text = text[:-1]
    return f"{text.rstrip()} ..."


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib ships: a cluster's node may have none of its own."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path(), "fonts/ttf", name)), size)


# --- what the policy does ---


def action_chunks(found: Predictions, *, title: str) -> Figure:
    """Draw a line of panels for every number of the action: some chunks, and the error at each step.

    Grey is what was done, or in the last panel the error of an answer that is always the mean action.
    """
    whole = np.flatnonzero(found.valid.sum(axis=1) == found.valid.sum(axis=1).max())
    shown = whole[list(spread(len(whole), at_most=SHOWN_CHUNKS))]
    width, across = min(len(found.names), MOST_ACTIONS), len(shown) + 1
    if width < len(found.names):
        title += f"\nThe first {width} of {len(found.names)} numbers of the action."
    size = (2.9 * across + 0.6, 1.5 * width + 1.5)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(width, across, sharex=True, squeeze=False)
    errors, of_the_mean = found.errors(), found.errors_of_the_mean()
    steps = np.arange(1, len(errors) + 1)
    for number, line in enumerate(axes[:width]):
        for axis, place in zip(line, shown, strict=False):
            valid = found.valid[place]
            axis.plot(steps[valid], found.true[place][valid, number], color=GREY, linewidth=1.6)
            axis.plot(steps, found.predicted[place][:, number], color=ACTION_COLOUR, linewidth=1.2)
            axis.sharey(line[0])
        line[-1].plot(steps, of_the_mean[:, number], color=GREY, linewidth=1.2, linestyle="--")
        line[-1].plot(steps, errors[:, number], color=MISSING, linewidth=1.4)
        line[-1].set_ylim(bottom=0)
        line[0].set_ylabel(str(found.names[number])[:18], fontsize=9, parse_math=False)
    for axis in axes.ravel():
        axis.tick_params(labelsize=7)
        axis.grid(visible=True, color="#e3e6ea", linewidth=0.6)
    for axis, place in zip(axes[0], shown, strict=False):
        place_of = f"episode {found.episode[place]}, frame {found.frame[place]}"
        axis.set_title(place_of, fontsize=9, loc="left", pad=3)
    axes[0, -1].set_title("mean absolute error", fontsize=9, loc="left", pad=3)
    for axis in axes[-1]:
        axis.set_xlabel("step of the chunk", fontsize=9)
    _key(
        figure,
        {
            "done": (GREY, "-"),
            "predicted": (ACTION_COLOUR, "-"),
            "its error": (MISSING, "-"),
            "error of the mean action": (GREY, "--"),
        },
    )
    _title(figure, title, across=across)
    return figure


def training_curves(points: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str) -> Figure:
    """Draw what a person asks of a run first, from (steps, values) of its metrics; what has none is left out.

    Loss in training and validation, error of the action, learning rate, gradient, speed, waiting.
    """
    panels = {
        name: [curve for curve in curves if curve in points]
        for name, curves in RUN_PANELS.items()
        if any(curve in points for curve in curves)
    }
    figure, axes = _grid(len(panels), title=title, panel_inches=(4.6, 2.9), across=3)
    for axis, (name, shown) in zip(axes, panels.items(), strict=True):
        for curve, colour in zip(shown, CURVE_COLOURS, strict=False):
            steps, values = points[curve]
            few = "." if len(steps) < 40 else None
            axis.plot(steps, values, color=colour, linewidth=1.3, marker=few, label=curve)
        axis.set_title(name, fontsize=10, loc="left", pad=3)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(visible=True, color="#e3e6ea", linewidth=0.6)
        if len(shown) > 1:
            axis.legend(fontsize=8, frameon=False)
        if name in FROM_ZERO:
            axis.set_ylim(0, max(FROM_ZERO[name], axis.get_ylim()[1]))
    return figure


# --- the curves ---


def curves(
    vectors: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]], *, title: str, fps: float
) -> Figure:
    """Draw a panel for every number of state and action over the seconds of one episode.

    Args:
        vectors: `observation.state` and `action`, each (L, D).
        names: For each the names of its D numbers; numbers of the same name share a panel.
        title: Two lines, each cut to the width of the figure.
        fps: Frames a second.
    """
    state, action = "observation.state", "action"
    panels = _panels(names[state], names[action])
    figure, axes = _grid(len(panels), title=title, panel_inches=(4.0, 1.9), sharex=True)
    time_s = np.arange(len(vectors[state])) / fps
    for axis, (state_number, action_number) in zip(axes, panels, strict=False):
        state_curve = None if state_number is None else vectors[state][:, state_number]
        action_curve = None if action_number is None else vectors[action][:, action_number]
        label = _panel_label(names, state_number, action_number)
        _draw_panel(axis, time_s, state_curve, action_curve, label=label)
    for axis in axes[-PANELS_ACROSS:]:  # nothing stands below them
        axis.set_xlabel("time [s]", fontsize=9)
        axis.tick_params(labelbottom=True)
    _key(figure, {"observation.state": (STATE_COLOUR, "-"), "action": (ACTION_COLOUR, "-")})
    return figure


def histograms(
    values: Mapping[str, np.ndarray],
    names: Mapping[str, Sequence[str]],
    unit: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str,
) -> Figure:
    """Draw a panel for every number of state and action: how often which value occurs.

    Args:
        values: `observation.state` and `action`, each (N, D).
        names: For each the names of its D numbers.
        unit: For each what normalisation makes -1 and 1 of, (D,) each; grey in the panel.
        title: Lines, each cut to the width of the figure.
    """
    panels = [(vector, number) for vector in values for number in range(values[vector].shape[1])]
    figure, axes = _grid(len(panels), title=title, panel_inches=(3.2, 1.7))
    for axis, (vector, number) in zip(axes, panels, strict=False):
        low, high = (float(bound[number]) for bound in unit[vector])
        axis.axvspan(low, high, color="#e3e6ea", zorder=0)
        colour = ACTION_COLOUR if vector == "action" else STATE_COLOUR
        axis.hist(values[vector][:, number], bins=HISTOGRAM_BINS, color=colour, log=True)
        axis.set_ylim(bottom=0.7)  # one frame far outside is seen
        axis.yaxis.set_minor_formatter(NullFormatter())
        label = f"{vector.removeprefix('observation.')} {names[vector][number]}"
        axis.set_title(label, fontsize=9, loc="left", pad=3, parse_math=False)
        axis.tick_params(labelsize=7)
    for axis in axes[::PANELS_ACROSS]:
        axis.set_ylabel("frames", fontsize=8)
    return figure


def _grid(
    panels: int,
    *,
    title: str,
    panel_inches: tuple[float, float],
    sharex: bool = False,
    across: int = PANELS_ACROSS,
) -> tuple[Figure, list[Axes]]:
    """A figure of up to MOST_PANELS panels, row by row, with a title that says how many are left out."""
    shown = min(panels, MOST_PANELS)
    if panels > shown:
        title += f"\nThe first {shown} of {panels} panels."
    across = min(across, shown)
    down = -(-shown // across)
    size = (panel_inches[0] * across + 0.5, panel_inches[1] * down + 1.1)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    axes = figure.subplots(down, across, sharex=sharex, squeeze=False).ravel()
    for axis in axes[shown:]:
        axis.set_visible(False)
    _title(figure, title, across=across)
    return figure, list(axes[:shown])


def _title(figure: Figure, title: str, *, across: int) -> None:
    lines = [
        textwrap.shorten(line, CHARACTERS_A_PANEL * across, placeholder=" ...") for line in title.split("\n")
    ]
    figure.suptitle("\n".join(lines), fontsize=12, parse_math=False)  # an instruction may have dollar signs


def _panels(state: Sequence[str], action: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Pair numbers of state and action that have the same name; names that are numbers say nothing."""
    partner = {
        name: number
        for number, name in enumerate(action)
        if not name.isdecimal() and action.count(name) == state.count(name) == 1
    }
    panels: list[tuple[int | None, int | None]] = [
        (number, partner.get(name)) for number, name in enumerate(state)
    ]
    paired = {number for _, number in panels}
    return panels + [(None, number) for number in range(len(action)) if number not in paired]


def _panel_label(names: Mapping[str, Sequence[str]], state: int | None, action: int | None) -> str:
    if state is not None and action is not None:
        return names["action"][action]
    kind, number, all_names = (
        ("action", action, names["action"]) if state is None else ("state", state, names["observation.state"])
    )
    assert number is not None
    return f"{kind} {all_names[number]}"


def _draw_panel(
    axis: Axes, time_s: np.ndarray, state: np.ndarray | None, action: np.ndarray | None, *, label: str
) -> None:
    marker = "." if len(time_s) < 3 else None  # a line through one frame would be invisible
    if state is not None:
        axis.plot(time_s, state, color=STATE_COLOUR, linewidth=1.2, marker=marker)
    if action is not None:
        other = axis
        if state is not None and not _comparable(state, action):
            other = axis.twinx()
            other.tick_params(axis="y", labelsize=7, colors=ACTION_COLOUR)
            axis.tick_params(axis="y", colors=STATE_COLOUR)
        other.plot(time_s, action, color=ACTION_COLOUR, linewidth=1.0, marker=marker, alpha=0.9)
    axis.set_title(label, fontsize=9, loc="left", pad=3, parse_math=False)
    axis.tick_params(labelsize=7)
    axis.grid(visible=True, color="#e3e6ea", linewidth=0.6)
    axis.margins(x=0.01)


def _comparable(state: np.ndarray, action: np.ndarray) -> bool:
    """Whether both can be read on one axis: an absolute position and a small step per frame cannot."""
    together = np.ptp(np.concatenate([state, action]))
    return bool(together <= 3 * min(np.ptp(state), np.ptp(action)))


def _key(figure: Figure, lines: Mapping[str, tuple[str, str]]) -> None:
    """What the lines are: name -> (colour, style)."""
    handles = [Line2D([], [], color=colour, linestyle=style) for colour, style in lines.values()]
    figure.legend(
        handles, list(lines), loc="outside lower right", ncols=len(lines), fontsize=9, frameon=False
    )
