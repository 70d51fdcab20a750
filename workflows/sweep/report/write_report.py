"""Puts the report of a finished sweep together: report.html, a page that needs nothing but a browser."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.config import Config
from workflows.publishing.embedding import embedded_animation, embedded_picture, thumbnail
from workflows.publishing.page import plotting_library, write_page
from workflows.storage.run_record import read_record
from workflows.storage.storage import Storage
from workflows.sweep.champion import Champion
from workflows.sweep.report import (
    commands,
    findings,
    quality_figures,
    schedule_figures,
    tables,
    training_figures,
)
from workflows.sweep.report.standings import ROLE_NAMES, Standings
from workflows.sweep.trial_records import TrialRecords

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_THUMBNAIL_SIDE = 120  # pixels
_PART_OF_IMAGES = 3 / 8  # of the width of a grid of 8 by 8 images: more would be too small to see
_MAX_THUMBNAILS = 300  # of the best trials, to keep the page small
_MARKS = {"champion": "★", "mse": "◆", "runner-up": "■"}


def write_report(
    directory: Path,
    records: TrialRecords,
    space: Mapping[str, tuple[Any, ...]],
    champion: Champion,
    correlations: Mapping[int, float],
    *,
    interrupted: bool = False,
    location_hint: str = "",
    bucket: str | None = None,
) -> Path:
    """Write report.html into a sweep's folder and return its path.

    Style, script and pictures are embedded, so that the page can be sent, printed, and shown by a tracker.

    Args:
        directory: folder of the sweep.
        records: records of the sweep's trials.
        space: searched parameters by dotted name, each with its choices or the two ends of its range.
        champion: champion of the sweep.
        correlations: rank correlation between the objectives at each rung and the final ones, by the rung's
            updates.
        interrupted: whether the sweep was interrupted before all trials were done.
        location_hint: where the tracker shows the sweep's runs: a command or a URL.
        bucket: address of a sweep in a bucket, of which `directory` is a copy; else None.
    """
    standings, names = Standings(records, champion), list(space)
    params = records[champion.trial_id].params
    model = _model_facts(champion.directory)
    config = _config(params, model, standings)
    columns, rows = tables.leaderboard(standings, names)
    part = _PART_OF_IMAGES if model.get("data", {}).get("kind") == "image" else 1.0
    run = read_record(Storage(str(directory)))
    sessions = run.provenance if run else []
    planned = run.options.get("num_trials") if run else None
    return write_page(
        directory / REPORT,
        _TEMPLATE,
        name=directory.name,
        data_name=str(params.get("data.name", "")),
        data=model.get("data", {}),
        counts=_counts(records),
        interrupted=interrupted,
        planned=planned if interrupted and planned and planned > len(records) else None,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        standings=standings,
        champion=champion,
        record=records[champion.trial_id],
        why=findings.why_it_won(standings),
        reasons=[f"{reason[0].upper()}{reason[1:]}." for reason in champion.reasons],
        realism=findings.as_good_as_real(champion.metrics),
        copying=findings.does_it_copy(champion.metrics),
        mse=findings.what_mse_would_pick(standings),
        advice=findings.advice(standings, space),
        samples=embedded_picture(champion.directory / "samples.png"),
        animation=embedded_animation(champion.directory / "animation.gif"),
        nearest=embedded_picture(champion.directory / "nearest.png"),
        next_commands=commands.next_commands(
            directory, config, max(len(records), 1), location_hint, interrupted=interrupted, bucket=bucket
        ),
        parameters=tables.parameters(standings, space),
        fixed_parameters=tables.fixed_parameters(standings, space),
        metrics=tables.metrics(champion.metrics),
        side_by_side=tables.side_by_side(standings),
        portraits=[(each, _portrait(standings, each.trial_id)) for each in standings.protagonists],
        columns=columns,
        rows=rows,
        thumbnails={
            row.record.trial_id: thumbnail(
                records.folder(row.record.trial_id) / "samples.png", _THUMBNAIL_SIDE, part
            )
            for row in rows[:_MAX_THUMBNAILS]
        },
        max_thumbnails=_MAX_THUMBNAILS if len(rows) > _MAX_THUMBNAILS else None,
        statuses=sorted({record.status for record in records}),
        role_names=ROLE_NAMES,
        marks=_MARKS,
        training_charts=[
            training_figures.learning_curves(standings, correlations),
            training_figures.effects(standings, names),
            training_figures.parameter_importance(standings, space),
        ],
        schedule_charts=[schedule_figures.schedules(standings), schedule_figures.error_by_log_snr(standings)],
        mse_chart=quality_figures.mse_against_quality(standings),
        sampler_chart=quality_figures.sampler_quality(champion.samplers),
        cost_chart=training_figures.cost(standings, records.elapsed),
        sessions=sessions,
        fingerprint=champion.data_fingerprint,
        recorded=[commands.recorded_command(session["command"]) for session in sessions],
        training_command=commands.training_command(config),
        plotly=plotting_library(),
    )


def _counts(records: TrialRecords) -> str:
    """Number of trials, and of those with each status."""
    statuses = [record.status for record in records]
    parts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    return f"{len(statuses)} trial{'' if len(statuses) == 1 else 's'}: {', '.join(parts)}"


def _portrait(standings: Standings, trial_id: str) -> str | None:
    """Samples of a trial from the same noise as those of the other trials; the champion's own if it was
    trained longer."""
    is_longer = trial_id == standings.champion.trial_id and standings.was_trained_longer
    folder = standings.champion.directory if is_longer else standings.records.folder(trial_id)
    return embedded_picture(folder / "samples.png")


def _model_facts(folder: Path) -> dict[str, Any]:
    """What config.json of a model says; nothing if it is missing."""
    try:
        tree = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _config(params: Mapping[str, Any], model: Mapping[str, Any], standings: Standings) -> Config:
    """Config that the champion was trained with, before a sampler was chosen for it."""
    config = Config().with_values(dict(params))
    if standings.was_trained_longer and "config" in model:
        updates = Config.from_dict(model["config"]).training.num_updates
        config = config.with_values({"training.num_updates": updates})
    return config
