"""Figures of a study: score against cost, gains by degrees, the transfer of the gap, methods side by side, learning."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import product

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from tocom.analysis import across
from tocom.analysis.curves import Curve, curves, unit_of
from tocom.analysis.planned import ALL, Scope, is_compensated, mismatches, plain_methods, train_degrees, without_degree
from tocom.analysis.run import Run, primary, transfer_methods, transferred
from tocom.analysis.stats import stars
from tocom.analysis.tables import DECLINED, NOT_PLANNED, NOT_RUN, cost_text, gain_text, p_is, signed
from tocom.settings import GFLOPS, PLAIN

#: Metadata without dates, so that the same numbers give the same bytes.
CLEAN = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
#: How many panels stand side by side, and the size of one (inches).
_COLUMNS, _WIDTH, _HEIGHT = 3, 3.9, 3.3
#: Up to so many tasks, a panel names them, if that takes no more than so many lines; letters in an inch of a title.
_FEW, _LINES, _LETTERS = 3, 2, 12
#: Of methods without a fixed train degree; of the edge of a star, which is a model at the degree it was trained at.
_NO_DEGREE, _EDGE = "0.35", "black"
_STAR = {"marker": "*", "markersize": 9.5, "markeredgecolor": _EDGE, "markeredgewidth": 0.8, "linestyle": "none"}
_MARKERS = "osD^vPX"
#: Lines of the compensated methods of a family; of more, one is drawn.
_COMPENSATED = ("-", (0, (7, 1)), (0, (3, 1, 1, 1)))
#: Up to so many curves in a panel, the losses of their trainings are drawn, too.
_READABLE = 4
#: Of methods that are adapted to each model, in one panel with many others.
_ADAPTED = {"linestyle": (0, (4, 1, 1, 1)), "linewidth": 3}
#: Up to so many curves can be told by their colours.
_TOLD = 10
#: How large the panel of many compressors is (inches): for a talk.
_TALK = 11, 6.6
#: What a colour map keeps of a colour whose gain cannot be told from noise.
_PALE = 0.35


def draw(run: Run, backbone: str) -> dict[str, Figure]:
    """Return every figure of one backbone by name."""
    sns.set_theme(context="paper", style="whitegrid", font_scale=1.05)
    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 160, "pdf.fonttype": 42, "font.family": "DejaVu Sans"})
    figures = {"accuracy_vs_gflops": (score_by_compressor if _is_wide(run) else score_against_cost)(run, backbone)}
    figures |= {"gain_heatmap": gain_heatmap(run, backbone)} if run.study.compare else {}
    if any(at.train.isdigit() for method in run.study.methods for at in mismatches(run.study, method)):
        figures["mismatch"] = mismatch_maps(run, backbone)
    figures |= {"gap_transfer": gap_transfer(run, backbone)} if run.study.transfer else {}
    figures |= methods_compared(run, backbone)
    found = learned_schedules(run, backbone)
    figures |= {"schedules": schedule_lines(run, found)} if found else {}
    there = curves(run, backbone)
    return figures | ({"curves": training_curves(run, there)} if there else {})


def _grid(n_panels: int, width: float, height: float, n_columns: int = _COLUMNS) -> tuple[Figure, list]:
    """Return a figure and the axes of so many panels of a size."""
    columns = min(n_columns, n_panels)
    rows = -(-n_panels // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[n_panels:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:n_panels])


def _title(scope: Scope, width: float = _WIDTH) -> str:
    """Return the title of a group's panel, so many inches wide, which names its tasks where they are few."""
    if len(scope.tasks) == 1:
        return scope.tasks[0]
    lines = textwrap.wrap(f"{scope.name}: {', '.join(scope.tasks)}", int(_LETTERS * width))
    few = scope.name != ALL and len(scope.tasks) <= _FEW and len(lines) <= _LINES
    return "\n".join(lines) if few else scope.name


def _colours(run: Run) -> dict[str, tuple]:
    """Return a colour for each train degree, ascending."""
    labels = sorted({label for method in run.study.methods for label in train_degrees(run.study, method)}, key=int)
    many = plt.get_cmap("plasma")(np.linspace(0, 0.85, len(labels)))  # less its yellow, which white hides
    palette = sns.color_palette("colorblind") if len(labels) <= 6 else many
    return dict(zip(labels, map(tuple, palette), strict=False))


def _legend(figure: Figure, handles: list) -> None:
    """Put a legend below the panels, in as many columns as fit, or beside a single one; the figure grows by it."""
    width, height = figure.get_size_inches()
    widest = 0.45 + 0.085 * max(len(handle.get_label()) for handle in handles)
    columns = int(width / widest)
    if columns < 2:
        figure.set_size_inches(width + widest, height)
        figure.legend(handles=handles, loc="outside right center", frameon=False)
    else:
        figure.set_size_inches(width, height + 0.25 * -(-len(handles) // columns))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


# --- score against cost ---------------------------------------------------------------------------------------------


def score_against_cost(run: Run, backbone: str) -> Figure:
    """Draw the score against the share of the uncompressed model's cost: a panel a group of tasks.

    Colours are for train degrees, lines for methods; each compressor has panels of its own. Of many
    compensated methods that share models with a plain one, one is drawn: that of the pair declared first, or else the
    first. Bars are one standard deviation over seeds. The panel of the primary endpoint names its gain.
    """
    study, by_compressor = run.study, {}
    for method in _drawn(run):
        by_compressor.setdefault(study.methods[method].compressor.name, []).append(method)
    colours, looks = _colours(run), _looks(run, by_compressor.values())
    rows = [(methods, scope) for methods in by_compressor.values() for scope in run.scopes]
    figure, axes = _grid(len(rows), _WIDTH, _HEIGHT, len(run.scopes) if 1 < len(run.scopes) < len(rows) else _COLUMNS)
    for axis, (methods, scope) in zip(axes, rows, strict=True):
        for number, method in enumerate(methods):
            for label in study.train_degrees_of(method):
                aside = number - (len(methods) - 1) / 2
                _line(axis, run, backbone, method, scope, label, aside, colours.get(label, _NO_DEGREE), looks[method])
        of = f"\n{run.title(methods[0])}" if len(by_compressor) > 1 else ""
        _cost_axis(axis, run, backbone, scope)
        axis.set_title(f"{_title(scope)}{of}")
    for axis, row in zip(axes, rows, strict=True):
        _point_out_gain(axis, run, backbone, row, colours)
    handles = [Line2D([], [], color=c, linewidth=3, label=f"trained at {label}") for label, c in colours.items()]
    handles += [Line2D([], [], color=_NO_DEGREE, label=run.title(method), **look) for method, look in looks.items()]
    handles += [Line2D([], [], color="white", label="trained at the degree it runs at", **_STAR)] if colours else []
    _legend(figure, handles)
    return figure


def _cost_axis(axis, run: Run, backbone: str, scope: Scope) -> None:
    """Say what the score is drawn against."""
    cost, unit = run.uncompressed(backbone, scope), run.cost_unit
    of_what = unit if np.isnan(cost) else f"% of the uncompressed model's {cost_text(cost)} {unit}"
    width = int(_LETTERS * axis.figure.get_figwidth() / axis.get_gridspec().ncols)
    axis.set(xlabel=textwrap.fill(of_what, width), ylabel=f"test {run.study.metric} (%)")
    axis.locator_params(axis="x", nbins=6)


def _drawn(run: Run) -> list[str]:
    """Return the methods to draw: all plain ones, and of each family the compensated ones if they are few, else one."""
    headline = [method for pair in run.study.compare[:1] for method in pair]
    drawn = []
    for _, ours in run.with_compensators():
        drawn += ours if len(ours) < len(_COMPENSATED) + 1 else [next((m for m in headline if m in ours), ours[0])]
    return [method for method in run.study.methods if method in drawn or not is_compensated(run.study, method)]


def _looks(run: Run, rows: Sequence[Sequence[str]]) -> dict[str, dict]:
    """Return the line and marker of each method; those in other rows of panels may look alike."""
    looks = {}
    for methods in rows:
        for number, method in enumerate(methods):
            fixed, filled = bool(train_degrees(run.study, method)), is_compensated(run.study, method)
            solid = _COMPENSATED[
                sum(is_compensated(run.study, other) for other in methods[:number]) % len(_COMPENSATED)
            ]
            look = {
                "linestyle": ":" if not fixed else solid if filled else "--",
                "marker": _MARKERS[number % len(_MARKERS)],
            }
            # Hollow markers lie over filled ones, so that equal scores are seen to be two.
            looks[method] = look | {"markersize": 4.5, "markerfacecolor": None if filled else "white"}
    return looks


def _x(run: Run, backbone: str, method: str, scope: Scope, infer: int) -> float:
    """Return where a degree stands on the axis of the cost: the cost itself where the share is unknown."""
    share = run.share(backbone, method, scope, infer)
    return run.cost(backbone, method, scope, infer) if np.isnan(share) else share


def _line(
    axis, run: Run, backbone: str, method: str, scope: Scope, train: str, aside: float, colour, look: dict
) -> None:
    """Draw one method from one train degree.

    Args:
        aside: by how many steps it is moved to the right, so that it hides no other.
    """
    degrees = sorted(run.study.infer_degrees_of(method))
    runs = {n: run.score(backbone, method, scope, train, n) for n in degrees}
    there = [n for n in degrees if not runs[n].empty]
    x = np.array([_x(run, backbone, method, scope, n) for n in there])
    x = x + aside * 0.008 * np.ptp(x) if len(x) else x
    y, sd = (np.array([getattr(runs[n], what)() for n in there]) for what in ("mean", "std"))
    order = 2 if is_compensated(run.study, method) else 3
    bars = {"elinewidth": 0.8, "markeredgewidth": 1.0, "alpha": 0.9}
    axis.errorbar(x, y, np.nan_to_num(sd), color=colour, linewidth=1.4, zorder=order, **bars, **look)
    if train in map(str, there) and not is_compensated(run.study, method):
        at = there.index(int(train))
        axis.plot(x[at], y[at], color=colour, zorder=4, **_STAR)


def _point_out_gain(axis, run: Run, backbone: str, row: tuple[Sequence[str], Scope], colours: dict) -> None:
    """Write the gain at the primary endpoint's degrees into its panel."""
    methods, scope = row
    end, found = primary(run, backbone) or (None, None)
    if end is None or scope != end.scope or found.train not in colours or not {end.before, end.after} <= set(methods):
        return
    pair = end.before, end.after
    x, colour = _x(run, backbone, pair[1], scope, found.infer), colours[found.train]
    before, after = found.before.mean(), found.after.mean()
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    axis.set(xlim=(left - 0.05 * (right - left), right), ylim=(low - 0.3 * (high - low), high))  # room for both
    x -= 0.05 * (right - left)
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    axis.annotate("", (x, after), (x, before), arrowprops=arrow, zorder=6)
    leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 1), "shrinkA": 2, "shrinkB": 2}
    gain, _, interval = gain_text(found, run.corrected([backbone], [scope], [pair])).partition(" ")
    text = f"{run.title(pair[1])}\n" + (f"{gain} points {interval}" if interval else gain)
    style = {"va": "bottom", "fontsize": 10, "fontweight": "bold", "color": colour}
    axis.annotate(text, (x, min(before, after)), (0.08, 0.03), textcoords="axes fraction", arrowprops=leader, **style)


# --- the same, of many compressors ----------------------------------------------------------------------------------


def _with_and_without(run: Run) -> list[tuple[str, str]]:
    """Return the first plain method of each compressor that saves GFLOPs, and the one with what compensates it.

    Of its compensators that is the last one that the study declares, as it is declared first.
    """
    study, found = run.study, {}
    for plain, ours in run.with_compensators():
        last = study.methods[ours[-1]].compensator
        best = next(method for method in ours if study.methods[method].compensator == last)
        if study.methods[plain].compressor.part.saves == GFLOPS and not is_compensated(study, plain):
            found.setdefault(study.methods[plain].compressor, (plain, best))
    return list(found.values())


def _is_wide(run: Run) -> bool:
    """Return whether compressors are too many for panels of their own, and one has something to show in one panel."""
    compressors = {method.compressor for method in run.study.methods.values()}
    return len(compressors) > _COLUMNS and run.cost_unit == GFLOPS and bool(_with_and_without(run))


def score_by_compressor(run: Run, backbone: str) -> Figure:
    """Draw the score against cost of models trained at the lowest degree, without and with a compensator: one panel.

    Each compressor has a colour. Stars are models that run at the degree they were trained at, diamonds those that were
    trained at no one degree. Compressors that save anything but GFLOPs are left out.
    """
    study, scope, pairs = run.study, run.scopes[-1], _with_and_without(run)
    handles, ends = {}, []
    with sns.plotting_context("talk", font_scale=0.9):
        figure, (axis,) = _grid(1, *_TALK)
        for pair, colour in zip(pairs, sns.color_palette("colorblind", len(pairs)), strict=True):
            for label, look, conditions in _shown(study, *pair):
                points = _points(run, backbone, scope, conditions)
                axis.plot(*points.T, color=colour, zorder=3 if "marker" not in look else 4, **look)
                handles |= {label: Line2D([], [], color=_NO_DEGREE, label=label, **look)} if len(points) else {}
                if len(points) and "marker" not in look:
                    ends.append((*points[0], study.methods[conditions[0][0]].title, colour))
        _cost_axis(axis, run, backbone, scope)
        _name_ends(axis, ends)
        trained = sorted({train_degrees(study, plain)[0] for plain, _ in pairs}, key=int)
        axis.set_title(f"Trained at {', '.join(trained)}, run at other degrees ({_title(scope, _TALK[0])})")
        figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _shown(study, plain: str, ours: str) -> list[tuple[str, dict, list[tuple[str, str, int]]]]:
    """Return the lines and dots of one compressor: label, look, and (method, train degree, inference degree)s."""
    lowest, *others = train_degrees(study, plain)
    rivals = [(name, study.train_degrees_of(name)[0]) for name in without_degree(study, plain)[:1]]
    diamond = {"marker": "D", "markersize": 8, "linestyle": "none", "markeredgecolor": "white"}

    def at_all(method: str, train: str) -> list[tuple[str, str, int]]:
        return [(method, train, infer) for infer in study.infer_degrees_of(method)]

    matched = [point for train in others for point in at_all(plain, train) if train == str(point[2])]
    entry = study.methods[ours]
    more = [name for name in study.sharing(study.tuned_as(plain)) if study.methods[name].adapt is not None]
    adapted = [name for name in more if study.methods[name].compensator == entry.compensator and entry.adapt is None]
    return [
        ("without compensator", {"linestyle": "--", "linewidth": 1.6}, at_all(plain, lowest)),
        ("with compensator", {"linestyle": "-", "linewidth": 3}, at_all(ours, lowest)),
        ("with one adapted to each model", _ADAPTED, [point for name in adapted[:1] for point in at_all(name, lowest)]),
        ("trained at the degree it runs at", _STAR | {"markersize": 17}, matched),
        ("trained at random degrees", diamond, [point for rival in rivals for point in at_all(*rival)]),
    ]


def _points(run: Run, backbone: str, scope: Scope, conditions: Sequence[tuple[str, str, int]]) -> np.ndarray:
    """Return cost and mean score [N, 2], by rising cost, of (method, train degree, inference degree)s that were run."""
    points = [
        (_x(run, backbone, method, scope, infer), run.score(backbone, method, scope, train, infer).mean())
        for method, train, infer in conditions
    ]
    return np.array(sorted(point for point in points if not np.isnan(point).any())).reshape(-1, 2)


def _name_ends(axis, ends: Sequence[tuple[float, float, str, tuple]]) -> None:
    """Write names beside the left ends (x, y, name, colour) of lines, so far apart that they can be read."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    x, y = np.array([end[:2] for end in ends]).T
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    size = plt.rcParams["legend.fontsize"]
    width, height = _TALK * np.array(0.85 * 72 / size)  # of the panel, in letters
    at, share = x.min() - 0.05 * (right - left), 0.62 * max(len(name) for *_, name, _ in ends) / width
    apart = 1.3 * (high - low) / height * np.arange(len(ends))
    places = isotonic_regression(y - apart).x + apart
    margin = 0.04 * (high - low)
    axis.set_xticks([tick for tick in axis.get_xticks() if left <= tick <= right])
    axis.set(
        xlim=(at - (right - at) * share / (1 - share), right),
        ylim=(min(low, places[0] - margin), max(high, places[-1] + margin)),
    )
    for (*end, name, colour), place in zip(ends, places, strict=True):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 1, "relpos": (1, 0.5)}
        style = {"ha": "right", "va": "center", "fontsize": size, "color": colour}
        axis.annotate(name, end, (at, place), arrowprops=leader, **style)


# --- maps -----------------------------------------------------------------------------------------------------------


_CMAP = plt.get_cmap("RdBu")
#: White at 0, and redder the larger: the lower half of that.
_RED = ListedColormap(_CMAP(np.linspace(0.5, 0.0, 256)))
#: How large a cell of the map of mismatches is, a line of text in it, and how wide a letter (inches).
_CELL, _TEXT, _LETTER = (0.5, 0.25), 0.2, 0.065
#: How wide its colour bar is with all its text (inches), and in how many columns its panels stand at most.
_BAR, _STACKS = 1.2, 4


def _two_sided(largest: float) -> ScalarMappable:
    """Return blue for what is above 0 and red for what is below."""
    return ScalarMappable(Normalize(-largest, largest), _CMAP)


def _map(
    axis, numbers: pd.DataFrame, texts: pd.DataFrame, scale: ScalarMappable, pale: pd.DataFrame | None = None
) -> None:
    """Draw numbers as colours with their texts.

    Args:
        texts: also of cells without a number, which are white.
        pale: cells whose colour is faded and whose text is grey; none by default.
    """
    pale = numbers.isna() if pale is None else pale | numbers.isna()
    colours = scale.to_rgba(numbers.fillna(0.0).to_numpy())[..., :3]
    keep = np.where(numbers.isna(), 0.0, np.where(pale, _PALE, 1.0))[..., None]
    colours = keep * colours + 1 - keep
    rows, columns = numbers.shape
    axis.imshow(colours, aspect="auto", extent=(0, columns, rows, 0))
    axis.set_xticks(np.arange(columns) + 0.5, numbers.columns)
    axis.set_yticks(np.arange(rows) + 0.5, numbers.index)
    axis.set_xticks(np.arange(columns + 1), minor=True)
    axis.set_yticks(np.arange(rows + 1), minor=True)
    axis.grid(visible=False)
    axis.grid(visible=True, which="minor", color="0.88", linewidth=0.8)
    axis.tick_params(which="both", length=0)
    sns.despine(ax=axis, left=True, bottom=True)
    for row, column in np.ndindex(rows, columns):
        dark = colours[row, column] @ (0.3, 0.59, 0.11) < 0.5
        look = "0.45" if pale.iloc[row, column] else "white" if dark else "black"
        text, size = texts.iloc[row, column], 8 if keep[row, column, 0] else 7
        weight = "normal" if pale.iloc[row, column] else "bold"
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=look, size=size, weight=weight)


def _colour_bar(figure: Figure, axes: list, label: str, scale: ScalarMappable) -> None:
    shrink = min(1.0, 4 / figure.get_figheight())
    label = textwrap.fill(label, int(9 * min(4, figure.get_figheight())))
    bar = figure.colorbar(scale, ax=axes, label=label, fraction=0.05, pad=0.02, aspect=25, shrink=shrink)
    bar.outline.set_visible(False)


def gain_heatmap(run: Run, backbone: str) -> Figure:
    """Draw the gain of the pair that is declared first over its degrees, for each group of tasks.

    What is not significant is pale; what was declined everywhere or not run has no colour and says so.
    """
    before, after = run.study.compare[0]
    found = {scope: run.pairs(backbone, (before, after), scope) for scope in run.scopes}
    corrected = run.corrected([backbone], run.scopes, [(before, after)])
    keys = list(found[run.scopes[0]])
    index = {"index": list(dict.fromkeys(train for train, _ in keys)), "columns": sorted({infer for _, infer in keys})}
    scale = _two_sided(
        max([0.1, *(abs(pair.gain) for pairs in found.values() for pair in pairs.values() if pair.is_run)])
    )
    size = max(2.6, 0.72 * len(index["columns"]) + 0.9), max(2.2, 0.5 * len(index["index"]) + 1.0)
    figure, axes = _grid(len(found), *size)
    for axis, (scope, pairs) in zip(axes, found.items(), strict=True):
        numbers, texts, pale = (pd.DataFrame(value, **index) for value in (np.nan, NOT_PLANNED, True))
        for key, pair in pairs.items():
            texts.loc[key] = DECLINED if pair.declined and pair.is_run else NOT_RUN
            if pair.is_run and not pair.declined:
                star = "" if pair.test is None else stars(corrected[pair.test.name])
                numbers.loc[key], texts.loc[key], pale.loc[key] = pair.gain, signed(pair.gain) + star, not star
        _map(axis, numbers, texts, scale, pale)
        axis.set(title=_title(scope, size[0]), xlabel="inference degree", ylabel="train degree")
    _colour_bar(figure, axes, f"gain in points of {run.title(after)} over {run.title(before)}", scale)
    return figure


def mismatch_maps(run: Run, backbone: str) -> Figure:
    """Draw the mean score of every plain method over its train and inference degrees, on the widest scope.

    A line each for its models at a train degree, for these with each of its compensators, and for like methods that
    train at no one degree. Colours: points below the best line of that inference degree. Frames: models that run at the
    degree they were trained at.
    """
    plain, scope = plain_methods(run.study), run.scopes[-1]
    maps = [_by_train_degree(run, backbone, scope, method) for method in plain]
    below = [numbers.max() - numbers for numbers, _ in maps]
    largest = max(0.1, *(np.nan_to_num(one).max(initial=0.0) for one in below))
    scale = ScalarMappable(PowerNorm(0.5, 0, largest), _RED)
    sizes = [
        (_LETTER * max(map(len, one.index)) + _TEXT, _CELL[0] * one.shape[1], _CELL[1] * len(one) + 3 * _TEXT)
        for one in below
    ]
    places, right, bottom = _placed(sizes)
    width = right + _BAR
    what = f"Test {run.study.metric} (%) by train degree (lines) and inference degree (columns): {scope.name}"
    header = textwrap.wrap(what, int(_LETTERS * width))
    above = (len(header) + 2) * _TEXT  # of the cells of the topmost panels
    height = max(above + bottom - 2 * _TEXT, 2 * _BAR)
    figure = plt.figure(figsize=(width, height))
    for name, numbers, (_, texts), (left, top), (labels, wide, tall) in zip(
        plain, below, maps, places, sizes, strict=True
    ):
        high = tall - 3 * _TEXT
        box = left / width, (height - above - top - high) / height, wide / width, high / height
        axis = figure.add_axes(box)
        _map(axis, numbers, texts, scale)
        axis.set_title(textwrap.shorten(run.title(name), int((labels + wide) / _LETTER)), loc="left", size=9)
        axis.tick_params(labelsize=8, pad=1)
        for row, column in np.argwhere(np.equal.outer(numbers.index, numbers.columns.astype(str))):
            axis.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=_EDGE, linewidth=1.4, zorder=3))
    bar = figure.add_axes(((right + 0.3) / width, (height - above - _BAR) / height, 0.13 / width, _BAR / height))
    figure.colorbar(scale, cax=bar).outline.set_visible(False)
    bar.set_ylabel("points below the\nbest of the column", size=8)
    bar.tick_params(labelsize=8)
    figure.suptitle("\n".join(header), x=0, y=1, ha="left", va="top", size=10)
    return figure


def _placed(sizes: Sequence[tuple[float, float, float]]) -> tuple[list[tuple[float, float]], float, float]:
    """Stack panels in columns of much the same height.

    Args:
        sizes: width of the labels, width and height of each panel.

    Returns:
        Left and top of each panel, less its labels; width and height of all.
    """
    labels, widths, heights = np.array(sizes).T
    n_columns = min(_STACKS, int(np.ceil(np.sqrt(len(sizes)))))
    columns = ((heights.cumsum() - heights / 2) * n_columns / heights.sum()).astype(int)
    places, left, height = [], 0.0, 0.0
    for mine in (columns == column for column in np.unique(columns)):
        left += labels[mine].max()
        places += [(left, top) for top in heights[mine].cumsum() - heights[mine]]
        left, height = left + widths[mine].max(), max(height, heights[mine].sum())
    return places, left, height


def _by_train_degree(run: Run, backbone: str, scope: Scope, plain: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the mean scores of a method, and of those made of it, by line and inference degree; and their texts."""
    study = run.study
    added = [method for method in study.sharing(study.tuned_as(plain)) if is_compensated(study, method)]
    lines = {
        " ".join(filter(None, (train, _beyond(run, method, plain)))): (method, train)
        for train in train_degrees(study, plain)
        for method in (plain, *added)
        if train in study.train_degrees_of(method)
    }
    lines |= {
        _beyond(run, method, plain): (method, study.train_degrees_of(method)[0])
        for method in without_degree(study, plain)
    }
    degrees = sorted(study.infer_degrees_of(plain))
    numbers = {
        label: [run.score(backbone, method, scope, train, n).mean() for n in degrees]
        for label, (method, train) in lines.items()
    }
    missing = {
        label: [NOT_RUN if n in study.infer_degrees_of(method) else NOT_PLANNED for n in degrees]
        for label, (method, _) in lines.items()
    }
    numbers, missing = (pd.DataFrame.from_dict(d, "index", columns=degrees) for d in (numbers, missing))
    return numbers, numbers.map("{:.1f}".format).where(numbers.notna(), missing)


def _beyond(run: Run, method: str, plain: str) -> str:
    """Return what a method's title says beyond that of the one it is made of."""
    return run.title(method).removeprefix(run.study.methods[plain].title).lstrip(", ") if method != plain else ""


def gap_transfer(run: Run, backbone: str) -> Figure:
    """Draw what each task's gap between two degrees does for each task, in points over adding none."""
    methods, tasks = transfer_methods(run.study), list(run.study.groups)
    changes = {method: transferred(run, backbone, method) for method in methods}
    means = {
        method: frame[frame.source_task != PLAIN].groupby(["source_task", "target_task"]).change.mean().unstack()
        for method, frame in changes.items()
    }
    means = {method: mean.reindex(index=tasks, columns=tasks).astype(float) for method, mean in means.items()}
    scale = _two_sided(np.nanmax([0.1, *(np.abs(mean.to_numpy()).max(initial=0) for mean in means.values())]))
    longest = max(map(len, tasks))
    slanted = longest > _LETTERS - 2
    size = 0.9 * len(tasks) + 1.0 + 0.075 * longest, 0.6 * len(tasks) + 1.3 + slanted * 0.05 * longest
    figure, axes = _grid(len(methods), *size)
    for axis, method in zip(axes, methods, strict=True):
        degrees = train_degrees(run.study, method)
        texts = means[method].map(lambda value: "" if np.isnan(value) else signed(value))
        _map(axis, means[method], texts, scale)
        title = f"Gap {degrees[0]} → {degrees[-1]} of one task, added to another\n({run.title(method)})"
        axis.set(title=title, xlabel="task that is evaluated", ylabel="task whose gap is added")
        if slanted:
            plt.setp(axis.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    _colour_bar(figure, axes, "change in points", scale)
    return figure


# --- methods side by side -------------------------------------------------------------------------------------------


def methods_compared(run: Run, backbone: str) -> dict[str, Figure]:
    """Return the figures of all methods at the endpoint's degrees, where there is enough of them."""
    there = across.measured(run, backbone)
    rivals, ranks = across.ranks_of(there)
    found = {"profiles": score_profiles(run, there)} if there else {}
    if ranks:
        apart = across.told_apart(run, backbone, rivals, ranks)
        names = [run.title(entry.method) for entry in rivals]
        found["ranks"] = rank_diagram(names, ranks, apart, len(run.scopes[-1].tasks))
    return found


def score_profiles(run: Run, there: dict[across.Entry, np.ndarray]) -> Figure:
    """Draw the share of runs, each a task under a seed, that score above a threshold; dashed: the ceilings.

    Many methods have a panel for each that is plain, with all that is made of it. Bands are 95 % intervals by drawing
    seeds within tasks; only where there are few methods, and several seeds.
    """
    every = np.unique(np.concatenate([scores.ravel() for scores in there.values()]))
    margin = 0.05 * np.ptp(every) + 0.1
    thresholds = np.array([every[0] - margin, *every, every[-1] + margin])
    panels, (train, infer) = _profile_panels(run, list(there)), across.degrees(run.study)
    size = (1.5 * _WIDTH, 1.2 * _HEIGHT) if len(panels) == 1 else (1.2 * _WIDTH, _HEIGHT)
    figure, axes = _grid(len(panels), *size)
    for axis, entries in zip(axes, panels, strict=True):
        _profiles(axis, run, {entry: there[entry] for entry in entries}, thresholds)
        if len(panels) > 1:
            axis.legend(fontsize=7, loc="lower left")
    axes[0].set_title(f"{run.scopes[-1].title}, {train} → {infer}" if train else run.scopes[-1].title)
    if len(panels) == 1:
        _legend(figure, axes[0].get_legend_handles_labels()[0])
    return figure


def _profile_panels(run: Run, entries: Sequence[across.Entry]) -> list[list[across.Entry]]:
    """Return which methods share a panel: all, or of more than can be told by their colours, those made of one."""
    if len(entries) <= _TOLD:
        return [list(entries)]
    study, left, found = run.study, dict.fromkeys(entries), []
    for plain in plain_methods(study):
        own = {*study.sharing(study.tuned_as(plain)), *without_degree(study, plain)}
        found.append([entry for entry in left if entry.method in own])
        left = dict.fromkeys(entry for entry in left if entry.method not in own)
    return [panel for panel in [*found, list(left)] if panel]


def _profiles(axis, run: Run, there: dict[across.Entry, np.ndarray], thresholds: np.ndarray) -> None:
    methods = dict.fromkeys(entry.method for entry in there)
    colours = dict(zip(methods, sns.color_palette("colorblind", len(methods)), strict=True))
    with_bands = sum(not entry.matched for entry in there) <= _READABLE
    for entry, scores in there.items():
        colour, line = colours[entry.method], "--" if entry.matched else "-"
        look = {"color": colour, "linestyle": line, "linewidth": 1.8, "label": across.title(run, entry)}
        axis.step(thresholds, 100 * across.profile(scores, thresholds), where="post", **look)
        if with_bands and not entry.matched and len(scores) > 1:
            draws = across.resampled(scores, run.study.analysis.resamples)
            ends = 100 * across.percentiles(across.profile(draws, thresholds))
            axis.fill_between(thresholds, *ends, step="post", color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=f"test {run.study.metric} (%)", ylabel="runs above it (%)", ylim=(-2, 102))


def rank_diagram(names: Sequence[str], ranks: across.Ranks, apart: np.ndarray, tasks: int) -> Figure:
    """Draw the critical-difference diagram (Demsar 2006, figure 1): bars join methods that cannot be told apart.

    Args:
        apart: which two are told apart, as :func:`tocom.analysis.across.told_apart` returns it.
    """
    order, k = np.argsort(ranks.means, kind="stable"), len(names)
    left, joined = (k + 1) // 2, across.alike(ranks.means, apart)
    wide, step = max(3.0, 0.2 * k), 0.24  # inches: of the axis of ranks, of a line
    beside = 0.1 + 0.085 * (max(map(len, names)) + len("  10.00"))
    top = 0.35 + 0.14 * len(joined)
    above, below = 1.0, top + step * left
    figure = plt.figure(figsize=(wide + 2 * beside, above + below))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set(xlim=(-beside, wide + beside), ylim=(below, -above))

    def at(rank: float) -> float:
        return (rank - 1) / (k - 1) * wide

    axis.plot([0, wide], [0, 0], color=_EDGE, linewidth=1.2)
    every = -(-k // 12)
    for rank in range(1, k + 1, every):
        axis.plot([at(rank)] * 2, [0, -0.06], color=_EDGE, linewidth=1.2)
        axis.text(at(rank), -0.1, str(rank), ha="center", va="bottom")
    for place, index in enumerate(order):
        mean, is_left = ranks.means[index], place < left
        y = top + step * (place if is_left else k - 1 - place)
        x, side = (-0.06, "right") if is_left else (wide + 0.06, "left")
        axis.plot([at(mean), at(mean), x], [0, y, y], color=_NO_DEGREE, linewidth=0.9)
        text = f"{names[index]}  {mean:.2f}" if is_left else f"{mean:.2f}  {names[index]}"
        axis.text(x, y, f" {text} ", ha=side, va="center")
    for number, (low, high) in enumerate(joined):
        y = 0.15 + 0.14 * number
        axis.plot([at(low) - 0.03, at(high) + 0.03], [y, y], color=_EDGE, linewidth=4, solid_capstyle="butt")
    middle = wide / 2
    axis.text(
        middle, 0.06 - above, f"Mean rank over {tasks} tasks, 1 is the best (Friedman's test: {p_is(ranks.p)})",
        ha="center", va="top", size="large",
    )  # fmt: skip
    if ranks.is_enough:
        half = (at(1 + ranks.critical) - at(1)) / 2
        axis.errorbar(half, -0.4, xerr=half, color=_EDGE, capsize=3, linewidth=1.2)
        axis.text(half, -0.46, f"critical difference {ranks.critical:.2f}", ha="center", va="bottom")
    else:
        tests = "tests over trainings and images, corrected for all pairs"
        note = f"Bars: what {tests}, cannot tell apart" if joined else f"All are told apart by {tests}"
        axis.text(middle, -0.5, note, ha="center", va="center")
    return figure


# --- schedules ------------------------------------------------------------------------------------------------------


def learned_schedules(run: Run, backbone: str) -> dict[str, list[dict]]:
    """Return, of every method whose compressor learned how many tokens blocks keep, the schedules of each seed.

    They are what such a file says of itself: degree -> ``prune_kept_num`` and ``merge_kept_num``, tokens by block.
    """
    found: dict[str, list[dict]] = {}
    for method in run.study.methods:
        seeds = run.study.seeds_of(method)
        summaries = [run.learned(backbone, method, seed, "compressor").get("summary", {}) for seed in seeds]
        schedules = [summary["schedules"] for summary in summaries if "schedules" in summary]
        if schedules and schedules not in found.values():
            found[method] = schedules
    return found


def schedule_lines(run: Run, found: dict[str, list[dict]]) -> Figure:
    """Draw how many tokens each block leaves at every inference degree: a panel a method, thin lines are seeds.

    Solid: after pruning and merging. Dashed: after pruning alone.
    """
    figure, axes = _grid(len(found), 1.5 * _WIDTH, _HEIGHT)
    for axis, (method, seeds) in zip(axes, found.items(), strict=True):
        degrees = [n for n in sorted(run.study.infer_degrees_of(method)) if all(str(n) in one for one in seeds)]
        colours = dict(zip(degrees, plt.get_cmap("plasma")(np.linspace(0, 0.85, max(1, len(degrees)))), strict=True))
        for degree, (kept, line) in product(degrees, (("prune_kept_num", "--"), ("merge_kept_num", "-"))):
            tokens = np.array([one[str(degree)][kept] for one in seeds])
            blocks, label = np.arange(1, tokens.shape[1] + 1), f"degree {degree}" if line == "-" else None
            if len(seeds) > 1:
                axis.plot(blocks, tokens.T, color=colours[degree], linewidth=0.5, alpha=0.6, linestyle=line)
            axis.plot(blocks, tokens.mean(axis=0), color=colours[degree], linewidth=1.8, linestyle=line, label=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.set(title=run.title(method), xlabel="block", ylabel="tokens left", ylim=(0, None))
        axis.plot([], [], color=_NO_DEGREE, linestyle="--", label="after pruning alone")
        axis.legend(fontsize=8)
    return figure


# --- curves ---------------------------------------------------------------------------------------------------------


def training_curves(run: Run, there: Sequence[Curve]) -> Figure:
    """Draw the validation score by epoch, a panel a task, and the held-out loss of parts that were learned in one more.

    Thin lines are seeds, thick ones their mean. Where a panel has few curves, the losses of the trainings are dashed.
    """
    tuned, learned = ([curve for curve in there if (curve.task is None) == is_part] for is_part in (False, True))
    tasks = [task for task in run.study.task_names if any(curve.task == task for curve in tuned)]
    markers = dict(zip(dict.fromkeys(curve.method for curve in tuned), _MARKERS * len(there), strict=False))
    with_losses = len({(curve.method, curve.train) for curve in tuned}) <= _READABLE
    figure, axes = _grid(len(tasks) + bool(learned), _WIDTH, _HEIGHT)
    for axis, task in zip(axes, tasks, strict=False):
        _by_epoch(axis, task, f"validation {run.study.metric} (%)")
        _task_panel(axis, run, [curve for curve in tuned if curve.task == task], markers, with_losses)
    if learned:
        _learned_panel(axes[-1], run, learned)
    _legend(figure, _curve_handles(run, there, markers, bool(tasks) and with_losses))
    return figure


def _task_panel(axis, run: Run, of_task: Sequence[Curve], markers: dict[str, str], with_losses: bool) -> None:
    losses, colours = axis.twinx() if with_losses else None, _colours(run)
    if losses:
        losses.set(ylabel="training loss")
        losses.grid(visible=False)
    unit = unit_of(run)
    groups: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for curve in of_task:
        groups.setdefault((curve.method, curve.train), []).append(curve.read())
    for (method, train), frames in groups.items():
        scores = unit * pd.concat([frame.held_out for frame in frames], axis=1)
        look = {"color": colours.get(train, _NO_DEGREE)}
        if len(frames) > 1:
            axis.plot(scores, linewidth=0.6, alpha=0.5, **look)
        axis.plot(scores.mean(axis=1), marker=markers[method], markersize=4, **look)
        if losses:
            loss = pd.concat([frame.loss for frame in frames], axis=1).mean(axis=1)
            losses.plot(loss, linestyle="--", linewidth=1.0, alpha=0.7, **look)


def _by_epoch(axis, title: str, label: str) -> None:
    axis.set(title=title, xlabel="epoch", ylabel=label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _learned_panel(axis, run: Run, learned: Sequence[Curve]) -> None:
    """Draw the loss of parts that were learned: on held-out images, without the part (dotted), and of the training.

    What a method learned with several seeds has one colour.
    """
    _by_epoch(axis, "learned parts", "held-out loss")
    methods = list(dict.fromkeys(curve.method for curve in learned))
    colours = dict(zip(methods, sns.color_palette("dark", len(methods)), strict=True))
    for curve in learned:
        frame, colour = curve.read(), colours[curve.method]
        axis.plot(-frame.held_out, color=colour, marker="o", markersize=4)
        axis.plot(frame.loss, color=colour, linestyle="--", linewidth=1.0, alpha=0.7)
        if curve.without is not None:
            axis.axhline(curve.without, color=colour, linestyle=":", linewidth=1.2)
    handles = [Line2D([], [], color=colours[m], marker="o", markersize=4, label=run.title(m)) for m in methods]
    axis.legend(handles=handles, fontsize=7)


def _curve_handles(run: Run, there: Sequence[Curve], markers: dict[str, str], with_losses: bool) -> list[Line2D]:
    """Return what the legend of the curves says."""
    colours, tuned = _colours(run), [curve for curve in there if curve.task]

    def line(label: str, color=_NO_DEGREE, **look) -> Line2D:
        return Line2D([], [], color=color, label=label, **look)

    handles = [
        line(f"trained at {train}{'' if train in colours else ' degrees'}", colours.get(train, _NO_DEGREE), linewidth=3)
        for train in sorted({curve.train for curve in tuned}, key=lambda train: (train not in colours, train.zfill(9)))
    ]
    handles += [line(run.title(m), marker=marker) for m, marker in markers.items()] if len(markers) > 1 else []
    handles += [line("each seed (thick: mean)", linewidth=0.6)] if len({curve.seed for curve in tuned}) > 1 else []
    handles += [line("training loss", linestyle="--")] if with_losses or len(tuned) < len(there) else []
    without = any(curve.without is not None for curve in there)
    return handles + ([line("without the learned part", linestyle=":")] if without else [])
