"""The studies: complete, dry, with the papers' costs, and different from their bases in what they declare alone."""

import csv
import importlib
import json
from pathlib import Path

import jax
import pytest

from configs.datasets import DATASETS
from mobilenet_jax import ablate
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import InvertedResidual
from mobilenet_jax.studies.study import RunKey, Study
from mobilenet_jax.training.config import flatten_config

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(path.stem for path in (ROOT / "configs" / "ablations").glob("*.py"))
with open(ROOT / "tests" / "models" / "architectures.csv", newline="") as _file:
    KERAS = [row for row in csv.DictReader(_file) if row["framework"] == "keras"]


def make_study(name: str, dataset: str = "digits") -> Study:
    module = importlib.import_module(f"configs.ablations.{name}")
    return Study(name=name, config=module.get_config(dataset), **module.sweep())


def golden(model: str, width: float = 1.0, resolution: int = 224) -> tuple[int, int]:
    """(params, multiply-adds) as counted on Keras' own network."""
    key = (model.removeprefix("mobilenet_"), width, resolution)
    rows = [row for row in KERAS if (row["family"], float(row["width"]), int(row["resolution"])) == key]
    assert len(rows) == 1, key
    return int(rows[0]["trainable_params"]), int(rows[0]["madds"])


def count(study: Study, variant: str, num_classes: int = 1000) -> tuple[int, int]:
    cost = study.compute_cost(variant, num_classes)
    return cost.params, cost.madds


def test_the_studies():
    assert STUDIES == [
        "block_forms",
        "depthwise_vs_standard",
        "expansion",
        "h_swish",
        "linear_bottleneck",
        "normalisation",
        "relu6_vs_relu",
        "se_gate",
        "shallow_vs_narrow",
        "shortcut",
        "squeeze_excite",
        "width",
        "width_resolution",
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_variants_differ_from_the_base_in_exactly_what_they_declare(name):
    for dataset in DATASETS:
        study = make_study(name, dataset)
        base = flatten_config(study.config)
        for variant, declared in study.variants.items():
            config = flatten_config(study.make_config(RunKey(0, variant)))
            changed = {key: value for key, value in config.items() if value != base[key]}
            assert changed.pop("name") == f"{name}_{variant}"
            assert changed == declared, (dataset, variant)
        assert study.variants[study.baseline] == {} or name == "shallow_vs_narrow"
    texts = [json.dumps(dict(changes)) for changes in study.variants.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_question_paper_and_finding(name):
    text = importlib.import_module(f"configs.ablations.{name}").__doc__ or ""
    assert f"python -m mobilenet_jax.ablate --config configs/ablations/{name}.py --workdir DIR" in text
    assert all(f"\n{word}: " in text for word in ("Question", "Paper", "Found here"))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("dataset", ["", ":digits"])
def test_dry_run_prints_what_each_variant_costs(name, dataset, capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    argv = [f"--config={ROOT / 'configs' / 'ablations' / name}.py{dataset}", f"--workdir={tmp_path / 'none'}"]
    if not dataset:  # Fashion-MNIST, wherever it is not prepared
        argv.append(f"--config.data.data_dir={tmp_path}")
    assert ablate.main([*argv, "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    study = make_study(name)
    rows = {line.split("  ")[0].removesuffix(" (base)"): line for line in lines[3:-2]}
    assert list(rows) == list(study.variants)
    for variant, line in rows.items():
        params, madds = count(study, variant, 10)
        assert f"{params:,}" in line.split()
        assert f"{madds:,}" in line.split()
        assert all(f"{key}={value}" in line for key, value in study.variants[variant].items())
    assert lines[-1].startswith("time: about " if dataset else "time: not known without the data (")
    assert not (tmp_path / "none").exists()


def test_the_networks_hold_what_the_plans_say():
    """Parameters of the module of every distinct network, counted by tracing it."""
    specs = {}
    for name in STUDIES:
        study = make_study(name)
        for variant in study.variants:
            spec = study.make_spec(variant, 10)
            cost = compute_cost(spec, 32)
            specs.setdefault((cost.params, cost.batch_stats), spec)
    assert len(specs) >= 18
    for (params, batch_stats), spec in specs.items():
        shapes = jax.eval_shape(lambda spec=spec: init_variables(MobileNet(spec, lowering="plain"), seed=0))
        found = [sum(leaf.size for leaf in jax.tree.leaves(shapes[kind])) for kind in ("params", "batch_stats")]
        assert found == [params, batch_stats]


# On ImageNet the networks are those of the papers.


def test_bases_on_imagenet_are_the_published_networks():
    models = {"v1": "mobilenet_v1", "v2": "mobilenet_v2", "v3_large": "mobilenet_v3_large"}
    bases = {name: make_study(name, "imagenet") for name in STUDIES}
    assert {study.config.model.name for study in bases.values()} == set(models.values())
    for name, study in bases.items():
        if name != "shallow_vs_narrow":
            assert count(study, study.baseline) == golden(study.config.model.name), name


def test_width_study_has_the_networks_of_keras():
    widths = [float(row["width"]) for row in KERAS if (row["family"], row["resolution"]) == ("v1", "224")]
    counts = {width: golden("mobilenet_v1", width) for width in widths}
    study = make_study("width", "imagenet")
    assert {float(v.removeprefix("width_")): count(study, v) for v in study.variants} == counts


def test_table_4_of_v1():
    """1704.04861 Table 4: 4,866 million multiply-adds and 29.3 million parameters against 569 and 4.2."""
    study = make_study("depthwise_vs_standard", "imagenet")
    params, madds = count(study, "standard")
    assert (round(params / 1e6, 1), round((madds - 1024 * 1000) / 1e6)) == (29.3, 4866)  # there without the classifier
    params, madds = count(study, "separable")
    assert (round(params / 1e6, 1), round(madds / 1e6)) == (4.2, 569)


def test_table_5_of_v1():
    """1704.04861 Table 5: 325 million multiply-adds and 2.6 million parameters (.75), 307 and 2.9 (shallow)."""
    study = make_study("shallow_vs_narrow", "imagenet")
    counts = {variant: count(study, variant) for variant in study.variants}
    assert {v: (round(p / 1e6, 1), round(m / 1e6)) for v, (p, m) in counts.items()} == {
        "narrow": (2.6, 325),
        "shallow": (2.9, 307),
        "full": (4.2, 569),
    }


def test_published_figures_are_those_of_the_reference(reference):
    with open(reference / "reference" / "published.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["system"] in ("paper", "paper-ablation")]
    top1 = {(row["variant"], float(row["width"]), int(row["resolution"])): float(row["top1"]) for row in rows}
    study = make_study("width")
    for variant, value in study.published.items():
        assert value == top1["mobilenet_v1", float(variant.removeprefix("width_")), 224]
    sizes = {"32px": 224, "28px": 192, "24px": 160, "16px": 128}
    for variant, value in make_study("width_resolution").published.items():
        _, width, size = variant.split("_")
        assert value == top1["mobilenet_v1", float(width), sizes[size]]
    variants = {
        "relu": "mobilenet_v3_large (all ReLU)",
        "from_16": "mobilenet_v3_large (h-swish@16)",
        "from_112": "mobilenet_v3_large (h-swish@112)",
        "from_80": "mobilenet_v3_large",
    }
    published = make_study("h_swish").published
    assert published == {v: top1[system, 1.0, 224] for v, system in variants.items() if v in published}
    text = (reference / "reference" / "ablations.md").read_text()
    assert make_study("depthwise_vs_standard").published == {"separable": 70.6, "standard": 71.7}
    assert "full convolutions 71.7" in text
    assert make_study("shallow_vs_narrow").published == {"narrow": 68.4, "shallow": 65.3, "full": 70.6}
    assert "width .75: 68.4" in text
    assert "layers: 65.3" in text


def test_h_swish_counts_channels_as_the_paper_does():
    """@16, @80 and @112 of 1905.02244 Table 5: the output channels of the first block with hard-swish."""
    study = make_study("h_swish", "imagenet")
    for variant, channels in (("from_16", 16), ("from_80", 80), ("from_112", 112)):
        rows = [row for row in study.make_spec(variant, 1000).blocks if isinstance(row, InvertedResidual)]
        assert next(row.filters for row in rows if row.activation == "hard_swish") == channels


def test_block_forms_have_one_budget():
    study = make_study("block_forms")
    base = count(study, study.baseline, 10)[1]
    assert {v: round(count(study, v, 10)[1] / base, 3) for v in study.variants} == {
        "regular": 1.096,
        "separable": 0.996,
        "linear_bottleneck": 1.0,
        "inverted_residual": 1.0,
    }
