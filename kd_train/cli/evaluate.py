"""``kd-eval``. Heavy imports happen inside the command."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd_train.cli.dynamics import default_folder, evaluate_dynamics
from kd_train.cli.engine import ENGINES, EngineOptions, evaluate_engines
from pipeline.console import (
    FILE,
    HELP,
    PATH,
    PLACE,
    device_option,
    json_option,
    one_sentence_errors,
    threads_option,
    version_option,
)
from pipeline.errors import SpecError
from pipeline.files.atomic import hold_lock
from pipeline.logs import log_to_file
from pipeline.parallel.device_choice import choose_device

if TYPE_CHECKING:
    from kd_train.loader.split import Split
    from pipeline.datasets import Dataset, ReadOptions

log = logging.getLogger("kd_train")
BATCH_ATOMS = 2048
# For each number of --throughput.
MEASURED_SECONDS = 1.0


@click.command(context_settings=HELP)
@version_option
@click.argument("run", type=PATH)
@click.option(
    "--data",
    "--store",
    "data",
    type=PLACE,
    help="Data to evaluate on: a store, or a file or folder of a dataset. Default: "
    "none, for --dynamics.",
)
@click.option(
    "--dynamics",
    type=FILE,
    help="File that describes molecular dynamics to judge the student by, in place of "
    "--data. Exit code 1 if a threshold in it is exceeded. Default: none.",
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    help="Split of a store; may be repeated, and several may be joined with +. "
    "Default: every split by itself.",
)
@click.option(
    "--format",
    help="Format of a dataset, as in a spec. Default: by the names of its files.",
)
@click.option(
    "--energy",
    type=click.Choice(("adsorption", "total")),
    help="Kind of energies of oc20_raw. Default: adsorption if .txt files are there.",
)
@click.option(
    "--energy-key", help="Name of the energy in a dataset. Default: of its format."
)
@click.option(
    "--forces-key", help="Name of the forces in a dataset. Default: of its format."
)
@click.option(
    "--gradient-key",
    help="Name of a gradient in a dataset, in place of --forces-key; forces are its "
    "negative. Default: none.",
)
@click.option(
    "--virial-key",
    help="Name of the virial in a dataset; none reads neither virial nor stress. "
    "Default: virial or virials.",
)
@click.option(
    "--stress-key",
    help="Name of the stress in a dataset, positive in tension. Default: stress.",
)
@click.option(
    "--units",
    help="Units of a dataset: energy=kcal/mol,length=Å,forces=… Default: eV and Å.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Largest number of samples. Default: all of them.",
)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Stride over the samples: N takes each N-th sample.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the results. Default: the results are only printed; of --dynamics "
    "RUN/dynamics/NAME, by the name of its file.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Number of samples in a batch. Default: by --batch-atoms.",
)
@click.option(
    "--batch-atoms",
    type=click.IntRange(min=1),
    default=BATCH_ATOMS,
    show_default=True,
    help="Largest number of atoms in a batch, unless --batch-size is given.",
)
@click.option(
    "--throughput",
    is_flag=True,
    help="Measurement of samples per second, in addition. Default: none.",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(ENGINES),
    multiple=True,
    help="Program whose dynamics --throughput measures, on the first structure of "
    "--data; may be repeated. Default: none.",
)
@click.option(
    "--repeat",
    "repeats",
    type=click.IntRange(min=1),
    multiple=True,
    help="Number of cells along each axis for --engine; may be repeated. Default: 1 "
    "and 2; 1 of molecules.",
)
@click.option(
    "--dtype",
    type=click.Choice(("float32", "float64")),
    help="Precision for --engine. Default: float64.",
)
@device_option
@threads_option
@click.option(
    "--any-element",
    is_flag=True,
    help="Use of samples with elements that the training data lacked. Default: such "
    "samples are refused.",
)
@json_option
@one_sentence_errors
def eval_main(
    run: Path,
    data: str | None,
    dynamics: Path | None,
    splits: tuple[str, ...],
    format: str | None,
    energy: str | None,
    energy_key: str | None,
    forces_key: str | None,
    gradient_key: str | None,
    virial_key: str | None,
    stress_key: str | None,
    units: str | None,
    limit: int | None,
    every: int,
    out: Path | None,
    batch_size: int | None,
    batch_atoms: int,
    throughput: bool,
    engines: tuple[str, ...],
    repeats: tuple[int, ...],
    dtype: str | None,
    device: str | None,
    threads: int | None,
    any_element: bool,
    as_json: bool,
) -> None:
    """Metrics of a finished student on a store or a dataset, or in dynamics.

    RUN is a run folder, its student.safetensors, or a released checkpoint.
    """
    _refuse_run_folder(out)
    if dynamics is not None:
        folder = out or default_folder(run, _run_folder(run), dynamics)
        evaluate_dynamics(run, dynamics, folder, device, threads, any_element, as_json)
        return
    data = _require_data(data)
    if engines or repeats or dtype:
        options = EngineOptions(engines, repeats, dtype, device, threads, any_element)
        evaluate_engines(run, data, out or _run_folder(run), options, as_json)
        return
    import torch

    from kd_train.evaluation.load_student import known_elements, load_student
    from kd_train.evaluation.results_table import Scorecard, write_throughput
    from kd_train.evaluation.score import (
        dataset_eval_set,
        make_eval_batches,
        score,
        store_eval_set,
        throughput_pool,
    )
    from kd_train.evaluation.throughput import measure

    if threads is not None:
        torch.set_num_threads(threads)
    if (logs := out or _run_folder(run)) is not None:
        log_to_file(logs / "eval.log", logging.WARNING)
    place = choose_device(device)
    student = load_student(run, place)
    selection = {"limit": limit, "every": every}
    reading = {
        "energy_key": energy_key,
        "forces_key": forces_key,
        "gradient_key": gradient_key,
        "virial_key": virial_key,
        "stress_key": stress_key,
        "units": units,
    }
    elements = known_elements(student, "--any-element", any_element)
    if format is None and _is_store(data):
        _refuse_reading(reading)
        about, splits_chosen = _store_splits(data, splits, selection)
        eval_sets = [
            store_eval_set(s, student, elements, limit, every) for s in splits_chosen
        ]
    else:
        chosen = {"format": format, "energy": energy} | reading
        about, dataset = _dataset(data, splits, chosen, selection)
        eval_sets = [dataset_eval_set(Path(data).name, dataset, student, elements)]
    scores = [
        score(
            student,
            eval_set,
            make_eval_batches(eval_set, batch_size, batch_atoms),
            place,
        )
        for eval_set in eval_sets
    ]
    rate = None
    if throughput:
        rate = measure(student, throughput_pool(eval_sets[0]), place, MEASURED_SECONDS)
    card = Scorecard(student, run, about, scores, rate)
    for warning in card.warnings:
        log.warning("%s", warning)
    if out is not None:
        with hold_lock(out):
            card.write(out)
    if rate is not None:
        write_throughput(rate, about, run)
    click.echo(json.dumps(card.to_dict(), indent=2) if as_json else card.to_text())


def _refuse_run_folder(out: Path | None) -> None:
    if out is not None and (out / "config.yaml").exists():
        raise SpecError(
            f"--out {out} is a run folder, whose own results would be overwritten; "
            "name another one."
        )


def _require_data(data: str | None) -> str:
    if data is None:
        raise SpecError("There is nothing to evaluate on; name --data or --dynamics.")
    return data


def _run_folder(run: Path) -> Path | None:
    """The folder of a run or of its student; None for a released checkpoint."""
    folder = run if run.is_dir() else run.parent
    return folder if (folder / "config.yaml").exists() else None


def _is_store(data: str) -> bool:
    """Whether ``--data`` is a store: a URL, a zip archive, or a Zarr group."""
    path = Path(data)
    return "://" in data or path.suffix == ".zip" or (path / "zarr.json").exists()


def _store_splits(
    data: str, splits: tuple[str, ...], selection: dict[str, Any]
) -> tuple[dict[str, Any], list["Split"]]:
    from kd_train.loader.choose_split import choose_split
    from pipeline.store.reader import FeatureStore

    store = FeatureStore.open(data)
    names = tuple(dict.fromkeys(splits or store.splits))
    chosen = [choose_split(store, name) for name in names]
    about = {"path": data, "fingerprint": store.fingerprint, **selection}
    return about, chosen


def _dataset(
    data: str,
    splits: tuple[str, ...],
    chosen: dict[str, Any],
    selection: dict[str, Any],
) -> tuple[dict[str, Any], "Dataset"]:
    from kd_train.loader.datafiles import guess_format
    from kd_train.loader.distances import WarnsOfClosePairs
    from pipeline.datasets import open_dataset, warn_of_missing_labels
    from pipeline.datasets.paths import named_paths

    if splits:
        raise SpecError("--split chooses splits of a store, and --data is a dataset.")
    energy = chosen["energy"]
    format = chosen["format"] or guess_format(named_paths([data])[0])
    if energy is not None and format != "oc20_raw":
        raise SpecError("--energy is for --format oc20_raw; others have one kind.")
    options = _read_options(chosen)
    dataset = open_dataset(format, data, energy=energy, options=options, **selection)
    warn_of_missing_labels(f"--data {data}", dataset)
    about = {"path": data, **chosen, "format": format, **selection}
    return about, WarnsOfClosePairs(dataset)


def _refuse_reading(reading: dict[str, str | None]) -> None:
    for name, value in reading.items():
        if value is not None:
            option = name.replace("_", "-")
            raise SpecError(f"--{option} is for datasets; a store has its own labels.")


def _read_options(chosen: dict[str, Any]) -> "ReadOptions":
    from pipeline.datasets import ReadOptions
    from pipeline.spec.units import Units, parse_units

    keys = {name: chosen[f"{name}_key"] for name in ("energy", "forces", "gradient")}
    if keys["forces"] is not None and keys["gradient"] is not None:
        raise SpecError("--forces-key and --gradient-key exclude each other.")
    try:
        units = parse_units(chosen["units"]) if chosen["units"] else Units()
    except ValueError as error:
        raise SpecError(f"--units: {error}.") from None
    return ReadOptions(
        *(keys["energy"], keys["forces"], keys["gradient"], units),
        virial_key=chosen["virial_key"],
        stress_key=chosen["stress_key"],
    )
