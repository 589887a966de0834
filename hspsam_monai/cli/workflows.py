"""Train, evaluate, segment: each finds its configuration files and values, and runs MONAI's workflow on them."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hspsam_monai.cli.data_checks import class_count, require_good_data, require_readable, warn_of_trained
from hspsam_monai.cli.models import SHIPPED, Model, find_model, shipped_model, shipped_name, takes_supports
from hspsam_monai.cli.options import check_labels, check_overrides, config_path, device_setting, overlay_path
from hspsam_monai.errors import ConfigError, TrainingError, WeightsError
from hspsam_monai.files import atomic_write
from hspsam_monai.network_file import OVERLAY

logger = logging.getLogger(__name__)

LAST, BEST, CONFIG = "last.pt", "model.pt", "config.json"


def train(
    data: str | Path | None,
    output: str | Path,
    *,
    network: str | None = None,
    task: str | None = None,
    pretrained: str | Sequence[str] | None = None,
    resume: bool = False,
    check: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Check a data set and train on it with the bundle's ``train.json``.

    Args:
        data: the data set; ``None`` when resuming takes the run's own.
        output: folder of the run.
        network: name of an overlay in ``configs/network``.
        task: name of an overlay in ``configs/task``.
        pretrained: catalogue name, path, ``none`` (random), ``shipped`` (the shipped model of this kind of network) or
            the name of a shipped model; several, of whose later ones only the encoder is taken; ``None`` as configured.
        resume: go on with the run in ``output``, with the configuration it was started with.
        check: look through the data set first; faults stop the training.
        overrides: configuration entries.

    Returns:
        The best model's path.

    Raises:
        ConfigError: an unknown network, task or entry.
        DataError: the data set has faults.
        WeightsError: the pretrained weights are not there.
        TrainingError: ``output`` holds a run already, or none to resume.
    """
    from hspsam_monai.training import check_output

    output = _resolved(output)
    check_output(output, resume)  # before weights are looked for and a data set is read
    files = [config_path("train.json")]
    files += [overlay_path("network", network)] if network else []
    files += [overlay_path("task", task)] if task else []
    if resume and (output / CONFIG).is_file():
        files = [output / CONFIG]  # what the run was started with, whatever is repeated on the command line
    elif data is None:
        raise ConfigError("No data set is given. Name it with --data.")
    config = _merged(files)
    if "sampler" in config["validate"] and "RANK" not in os.environ:
        raise ConfigError(
            f"The run in {output} was trained by several processes; go on as it was started: torchrun "
            "--nproc_per_node=N -m monai.bundle run … --resume True."
        )
    _check_pair(config, network, task)
    values = _checked(overrides, config)
    check_labels({**config, **values}["labels"])
    if not str(values.get("feature_cache", "$")).startswith("$"):
        values["feature_cache"] = str(_resolved(values["feature_cache"]))
    values |= {"output_dir": str(output), "resume": resume}
    values |= {} if data is None else {"dataset_dir": str(_resolved(data))}
    source = config.get("pretrained") if pretrained is None else pretrained
    sources = [source] if source is None or isinstance(source, str) else source
    starts = [_pretrained(one, resume, shipped_name(config)) for one in sources]
    values["pretrained"] = starts[0] if len(starts) == 1 else starts
    if check:
        merged = {**config, **values}
        require_good_data(merged["dataset_dir"], merged["labels"], merged["num_classes"])
    run_workflow(files, "train", values)
    best = output / BEST
    if not best.is_file():
        raise TrainingError(f"The run in {output} ended without a validation, so there is no {BEST}; look at log.txt.")
    return best


def evaluate(
    data: str | Path,
    model: str | Path | None,
    output: str | Path,
    *,
    split: str = "val",
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score a model on a split: table, summary and galleries in ``output``; return the summary.

    Raises:
        ConfigError, WeightsError: see :func:`train`.
        DataError: cases of the split cannot be read; all are named, before anything is scored or written.
    """
    from hspsam_monai.data import find_cases
    from hspsam_monai.training import check_output

    found = find_model(model)
    _require_context(found)
    files = [config_path("train.json"), config_path("evaluate.json")]
    values = _checked(overrides, {**_merged(files), **found.network})
    output = _resolved(output)
    values |= {
        "dataset_dir": str(_resolved(data)),
        "val_split": split,
        "model": str(_resolved(found.path)),
        "output_dir": str(output),
    }
    values |= {"device": device_setting(device)} if device else {}
    check_output(output)
    merged = {**_merged(files), **found.network, **values}
    require_readable(find_cases(values["dataset_dir"], split), class_count(merged["labels"], merged["num_classes"]))
    warn_of_trained(found.path.parent, values["dataset_dir"], split)
    run_workflow(files, "evaluate", found.network | values)
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))


def segment(
    source: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    support: str | Path | None = None,
    flips: bool | None = None,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Segment an image or a folder of images into palette PNGs, with a gallery.

    Args:
        source: an image or a folder.
        output: folder of the masks.
        model: see :func:`hspsam_monai.cli.models.find_model`.
        support: ``images/`` and ``masks/`` that show what is to be segmented; the model is then a Proxy Prompt.
        flips: average four mirror images; ``None`` as configured.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; ``None`` the best there is.
        overrides: configuration entries.

    Raises:
        ConfigError, WeightsError: see :func:`train`.
        DataError: nothing to segment, or faulty supports; or, when all others are done, names every file that failed.
    """
    found = find_model(model, supports=support is not None)
    if support is None:
        _require_context(found)
    files = [config_path("inference.json"), *([config_path("support.json")] if support is not None else [])]
    values = _checked(overrides, {**_merged(files), **found.network})
    if support is not None:
        values |= {"support_dir": str(_resolved(support)), **_support_labels(found, support, values)}
    source, output = _resolved(source), _resolved(output)
    if source == output or (source.exists() and output.exists() and source.samefile(output)):
        raise ConfigError(f"{output} is the input as well; expected another folder for the masks.")
    values |= {"dataset_dir": str(source), "model": str(_resolved(found.path)), "output_dir": str(output)}
    values |= {} if flips is None else {"flips": flips}
    values |= {"device": device_setting(device)} if device else {}
    run_workflow(files, "infer", found.network | values)


def store_context(
    support: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Compute the context of supports once and store it with its model: a folder that is used like a training run's.

    Args:
        support: ``images/`` and ``masks/``.
        output: folder of ``model.pt`` (weights and context) and ``network.json``.
        model: a Proxy Prompt; ``None`` for the shipped one.
        device: see :func:`segment`.
        overrides: of ``labels``, ``image_size``, ``network_def``.

    Returns:
        Path of the model that was written.

    Raises:
        ConfigError, WeightsError, DataError: see :func:`segment`; or ``output`` holds a training run or the model.
    """
    import torch
    from monai.bundle import ConfigParser

    from hspsam_monai.encoders.state_files import halved, write_state
    from hspsam_monai.inference import give_context
    from hspsam_monai.networks import load_checkpoint

    output = _resolved(output)
    found = find_model(model, supports=True)
    there = next((name for name in (LAST, CONFIG, BEST, OVERLAY) if (output / name).is_file()), None)
    if there or output == found.path.parent:
        raise ConfigError(f"{output} holds {there or 'the model itself'}; expected another folder for the context.")
    values = _checked(overrides, found.network)
    parser = ConfigParser({**found.network, "imports": ["$import hspsam_monai"]})
    for key, value in {**values, **_support_labels(found, support, values)}.items():
        parser.set(value, key)  # also nested ones, a::b
    config = {key: parser.config[key] for key in found.network}
    network = parser.get_parsed_content("network_def")
    load_checkpoint(network, found.path, context=False)
    where = device_setting(device).split("'")[1] if device else "cuda:0" if torch.cuda.is_available() else "cpu"
    give_context(network.to(where), _resolved(support))
    # Losslessly, so that the masks are those of --support.
    write_state(output / BEST, {"model": halved(network.cpu().state_dict())})
    with atomic_write(output / OVERLAY) as part:
        part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return output / BEST


def _support_labels(found: Model, support: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """``labels`` and ``num_classes`` for supports: as given; else the model's, where their number is the same."""
    from hspsam_monai.inference import support_labels

    labels = values.get("labels")
    if labels is None:
        labels = support_labels(_resolved(support))
        labels = found.labels if len(found.labels) == len(labels) else labels
    return {"labels": labels, "num_classes": len(labels)}


def run_workflow(files: Sequence[Path], kind: str, values: Mapping[str, Any]) -> None:
    """Run one of the bundle's workflows, as ``python -m monai.bundle run`` does.

    Args:
        files: configuration files; later ones win.
        kind: MONAI's workflow type, ``train``, ``evaluate`` or ``infer``.
        values: entries of the configuration to replace, nested ones as ``a::b``.
    """
    from monai.bundle import ConfigWorkflow

    kinds = {"evaluate": "evaluation", "infer": "inference"}
    with _own_logs():
        workflow = ConfigWorkflow(
            config_file=[str(file) for file in files],
            meta_file=str(config_path("metadata.json")),
            logging_file=False,
            workflow_type=kinds.get(kind, kind),
            **values,
        )
        try:
            workflow.initialize()
            workflow.run()
        finally:
            workflow.finalize()
    del workflow
    gc.collect()  # engines and handlers refer to each other; several runs in one process must not add up


@contextmanager
def _own_logs() -> Iterator[None]:
    """A run's log file ends with it; MONAI's loggers write through ours."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("monai"):
            logging.getLogger(name).handlers.clear()
            logging.getLogger(name).propagate = True
    before = list(logging.root.handlers)
    try:
        yield
    except BaseException:
        logging.getLogger("run").exception("The run ended early.")  # for log.txt; the terminal shows a sentence
        raise
    finally:
        for handler in [h for h in logging.root.handlers if h not in before]:
            logging.root.removeHandler(handler)
            handler.close()


def _resolved(path: str | Path) -> Path:
    """Absolute, so that it holds from any folder and does not begin like one of MONAI's expressions; links stay links.

    Raises:
        ConfigError: it has a mark that MONAI would replace wherever it stands in a text.
    """
    if re.search(r"#|[@%]::", str(path)):
        raise ConfigError(f"{path}: found # or a mark that MONAI's configurations replace; expected another name.")
    return Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100, resolve() would follow links


def _merged(files: Sequence[Path]) -> dict[str, Any]:
    from monai.bundle import ConfigParser

    return ConfigParser.load_config_files([str(file) for file in files])


def _checked(overrides: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    values = check_overrides(overrides or {}, config)
    if "device" in values:
        values["device"] = device_setting(str(values["device"]))
    return values


def _check_pair(config: Mapping[str, Any], network: str | None, task: str | None) -> None:
    """Refuse a task that does not go with the network: both say what a training reads."""
    dataset = config["train"]["dataset"]
    if dataset["_target_"].endswith(".StoredEpisodeDataset") and not takes_supports(config):
        raise ConfigError(
            f"--task {task} trains on episodes, a target with its supports; expected a network that takes them, "
            f"--network proxy_prompt, not {network or 'the default'}."
        )
    if dataset["_target_"].endswith(".FeatureDataset") and "data" in dataset:
        raise ConfigError(
            f"--network {network} stores the features of a fixed list of cases, --task {task} draws its own; expected "
            "one of the two. For a frozen encoder with few masks: --task few_shot network_def::adapt=frozen."
        )


def _pretrained(source: str | None, resume: bool, kind: str) -> str:
    """Path or name of weights that are there; empty for random ones. ``kind``: which shipped model is meant."""
    if not source or source.lower() == "none":
        return ""
    if source == "shipped":
        return str(find_model(shipped_model(kind)).path)
    if source in SHIPPED and (Path(source).is_dir() or not Path(source).exists()):
        return str(find_model(source).path)
    from hspsam_monai.encoders.catalogue import CATALOGUE, locate

    try:
        path = locate(source)
    except WeightsError as error:
        if resume:
            return ""  # last.pt holds everything
        if source not in CATALOGUE:
            raise
        there = shipped_model(kind).is_file()
        shipped = ", `--pretrained shipped` starts from the shipped model" if there else ""
        raise WeightsError(
            f"{error} Or: `--pretrained none` starts from random values{shipped}, `--pretrained PATH` from any file."
        ) from None
    # A name stays a name: only then is the file's hash checked.
    return source if source in CATALOGUE and not Path(source).is_file() else str(path.resolve())


def _require_context(model: Model) -> None:
    """Refuse the shipped Proxy Prompt where no supports are given: it is stored without."""
    if model.path == shipped_model("proxy_prompt").resolve():
        raise ConfigError(
            "proxy_prompt knows no supports, which say what to look for; expected `hspsam segment --support DIR`, or a "
            "model that knows them: `hspsam context DIR KNOWN`, then `--model KNOWN`."
        )
