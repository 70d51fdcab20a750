"""The JavaScript module draws what `export.Sampler` draws, refuses what it refuses, and can be packed."""

import json
import random
import shutil
import subprocess
import tarfile
import tomllib
from typing import get_args

import numpy as np
import pytest

from benchmarks.fuzz import damaged
from benchmarks.javascript_runs import JAVASCRIPT, camel_case, in_node, node
from diffusion.errors import InputError
from diffusion.process.schedules import Spacing
from diffusion.registry import SAMPLERS
from export.sampler import Sampler

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("node_packages")]
TOLERANCE = 1e-6  # standard deviations; the two differ in the last bits of logarithms and cosines


@pytest.fixture(scope="module", name="files")
def _files(point_file, image_file, conditional_file):
    """Paths of files by kind."""
    return {"points": point_file, "image": image_file, "conditional": conditional_file}


def runs_of(path, *options, **others):
    return [{"file": str(path), "count": 2, "options": each, **others} for each in options]


def given(options):
    return {name: value for name, value in options.items() if value is not None}


def assert_same(outcome, expected):
    assert "samples" in outcome, outcome
    actual = np.array(outcome["samples"], dtype=np.float32).reshape(expected.shape)
    assert expected.std() > 0.1
    assert np.abs(actual - expected).max() <= TOLERANCE * expected.std()


def test_the_model_with_classes_heeds_them(files):
    sampler = Sampler(files["conditional"], provider="cpu")
    by_label = [sampler.sample(4, labels=label, guidance_scale=1.0) for label in range(3)]
    for first, second in zip(by_label, by_label[1:], strict=False):
        assert np.abs(first - second).max() > 1e3 * TOLERANCE * first.std()


def test_it_draws_every_sampler_at_every_spacing(files):
    choices = [
        {"sampler": sampler, "num_steps": num_steps, "eta": eta, "spacing": spacing}
        for sampler in SAMPLERS
        for eta in ([None, 0.5] if SAMPLERS[sampler].uses_eta else [None])
        for spacing in get_args(Spacing)
        for num_steps in (1, 2, 7, 16, 20)
    ]
    asked = [
        (files[kind], 3, {"seed": 5} | options) for kind in ("points", "image") for options in [{}, *choices]
    ]
    asked += [
        (files["conditional"], 5, options)
        for options in (
            {},
            {"labels": "eel"},
            {"labels": 1, "guidance_scale": 0.0},
            {"labels": [2, 2, "cat", 1, 0], "guidance_scale": 1.0, "seed": 2**32 + 9},
            {"labels": [2, 2, "cat", 1, 0], "guidance_scale": 4.0, "seed": -3},
            {"sampler": "ddim", "eta": 1.0, "num_steps": 5, "first_index": 7},
        )
    ]
    found = in_node(
        [
            {"file": str(path), "count": count, "options": camel_case(given(options))}
            for path, count, options in asked
        ]
    )
    for (path, count, options), outcome in zip(asked, found, strict=True):
        expected = Sampler(path, provider="cpu").sample(count, **options)
        assert_same(outcome, expected)


def test_it_reads_version_2(version_2, tmp_path):
    path = tmp_path / "sampler.onnx"
    path.write_bytes(version_2[2])
    peer = Sampler(path, provider="cpu")
    rng = np.random.default_rng(0)
    conditions = {each.name: rng.uniform(0.0, 5.0, (5, *each.shape)) for each in peer.spec.conditions}
    flat = {name: values.ravel().tolist() for name, values in conditions.items()}
    asked = [{}] + [{"sampler": sampler, "num_steps": 6, "eta": 0.0} for sampler in SAMPLERS]
    options = [camel_case(each) | {"seed": 5, "conditions": flat} for each in asked]
    found = in_node([{"file": str(path), "count": 5, "options": each} for each in options])
    for choices, outcome in zip(asked, found, strict=True):
        expected = peer.sample(5, seed=5, conditions=conditions, **choices)
        assert_same(outcome, expected)


def test_samples_do_not_depend_on_the_batch_and_callbacks_follow_the_rows(files):
    path = str(files["conditional"])
    whole, parts, later = in_node(
        [
            {"file": path, "count": 7},
            {"file": path, "count": 7, "options": {"batchSize": 3}, "watch": True},
            {"file": path, "count": 2, "options": {"firstIndex": 5}},
        ]
    )
    assert parts["samples"] == whole["samples"]
    assert later["samples"] == whole["samples"][10:]
    assert parts["rows"] == [[done, 18] for done in range(1, 19)]
    assert [each["first"] for each in parts["previews"]] == [0] * 6 + [3] * 6 + [6] * 6
    finished = [each for place in (5, 11, 17) for each in parts["previews"][place]["x0"]]
    assert finished == whole["samples"]
    previews = []
    Sampler(files["conditional"], provider="cpu").sample(7, batch_size=3, on_preview=previews.append)
    for ours, theirs in zip(parts["previews"], previews, strict=True):
        np.testing.assert_allclose(ours["x0"], theirs.ravel(), atol=1e-5)
        assert len(ours["x"]) == len(ours["x0"])


def test_a_signal_ends_a_call(files):
    program = f"""
import {{ readFileSync }} from "node:fs";
import {{ createRequire }} from "node:module";
import {{ Sampler }} from "{(JAVASCRIPT / "src" / "index.js").as_uri()}";
const ort = createRequire("{JAVASCRIPT.as_uri()}/")("onnxruntime-node");
const sampler = await Sampler.open(readFileSync({json.dumps(str(files["image"]))}), {{ ort }});
const controller = new AbortController();
let rows = 0;
const onRow = () => ++rows === 3 && controller.abort(new Error("enough"));
const error = await sampler.sample(2, {{ signal: controller.signal, onRow }}).catch((error) => error);
const aborted = AbortSignal.abort(new Error("before"));
const before = await sampler.sample(2, {{ signal: aborted }}).catch((error) => error);
const after = await sampler.sample(2);
console.log(JSON.stringify([error.message, rows, before.message, after.length]));
"""
    result = node("--input-type=module", "-e", program)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == ["enough", 3, "before", 128]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("points", {"seed": 1.5}, "seed 1.5: give a whole number"),
        ("points", {"sampler": "euler"}, "choose one of ddpm, ddim"),
        ("points", {"sampler": "toString"}, "choose one of ddpm, ddim"),
        ("points", {"sampler": "fast"}, "none was measured"),
        ("points", {"numSteps": 0}, "from 1 to 20"),
        ("points", {"numSteps": 21}, "from 1 to 20"),
        ("points", {"numSteps": 2.5}, "from 1 to 20"),
        ("points", {"spacing": "even"}, "choose one of leading"),
        ("points", {"eta": 1.5, "sampler": "ddim"}, "give 0 to 1"),
        ("points", {"eta": 0.5, "sampler": "ddpm"}, "use it, not ddpm"),
        ("points", {"labels": 0}, "has no classes"),
        ("points", {"guidanceScale": 2.0}, "has no classes"),
        ("points", {"conditions": {"low": [1.0]}}, "needs no conditions"),
        ("points", {"batchSize": 0}, "batchSize 0"),
        ("points", {"firstIndex": 2**32}, "firstIndex 4294967296"),
        ("conditional", {"labels": 3}, "give the name of a class (cat, dog, eel) or a number (0 to 2)"),
        ("conditional", {"labels": "cow"}, "give the name of a class"),
        ("conditional", {"labels": [0, 1, 2]}, "3 labels for 2 samples"),
        ("conditional", {"guidanceScale": 101.0}, "give 0 to 100"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_in_a_line(files, kind, options, message):
    (outcome,) = in_node(runs_of(files[kind], options))
    assert outcome["error"] == "InputError" and message in outcome["message"], outcome
    assert len(outcome["message"].splitlines()) == 1


def altered_spec(metadata, keys, value):
    spec = json.loads(metadata["ray_ddpm.spec"])
    parent = spec
    for key in keys[:-1]:
        parent = parent[key]
    if value is None:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value
    return metadata | {"ray_ddpm.spec": json.dumps(spec)}


# Values of every member of the spec, of which some are allowed: Python's reader says which.
VALUES = (
    *(0, 1, -1, 0.5, 1.5, 1e308, 10**6, True, "", "ddim", "x-1", "1x", "karras"),
    *([], [0.0], [1, 2], [2, 1], [-1.0, 1.0], [[1.0, 1.0]], [[1.0], [2.0, 3.0]], ["a"], ["a", "b"]),
    *({}, {"name": "ddim", "num_steps": 5}, None),
)


def members(tree, keys=()):
    for name, value in tree.items():
        yield (*keys, name)
        if isinstance(value, dict) and name != "provenance":
            yield from members(value, (*keys, name))


@pytest.mark.parametrize("version_2", ["conditions", "log_snr", "variance"], indirect=True)
def test_it_refuses_the_metadata_that_python_refuses(version_2, metadata_of, with_metadata, tmp_path):
    """Every member of the spec is replaced by many values or left out, every entry damaged or left out."""
    content = version_2[2]
    metadata = metadata_of(content)
    changed = [
        altered_spec(metadata, keys, value)
        for keys in members(json.loads(metadata["ray_ddpm.spec"]))
        for value in VALUES
    ]
    for key in metadata:
        changed.append({name: value for name, value in metadata.items() if name != key})
        changed += [
            metadata | {key: text} for text in ("", "!!!", "AAAA", metadata[key][:-16], "[1]", "null")
        ]
    paths, expected = [], []
    for number, each in enumerate(changed):
        data = with_metadata(content, each)
        try:
            Sampler(data, provider="cpu")
            expected.append("opened")
        except InputError:
            expected.append("refused")
        paths.append(tmp_path / f"{number}.onnx")
        paths[-1].write_bytes(data)
    assert expected.count("opened") > 20 and expected.count("refused") > 300
    found = in_node([{"file": str(path), "count": 0} for path in paths])
    for outcome in found:
        assert outcome["error"] == "InputError" and len(outcome["message"].splitlines()) == 1, outcome
    verdicts = ["opened" if each["message"].startswith("numSamples 0") else "refused" for each in found]
    different = [
        (theirs, outcome["message"], each["ray_ddpm.spec"][:700])
        for each, theirs, ours, outcome in zip(changed, expected, verdicts, found, strict=True)
        if theirs != ours
    ]
    assert not different


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_files_give_samples_or_a_line(point_onnx, tmp_path, seed):
    rng = random.Random(seed)
    paths = [tmp_path / f"{number}.onnx" for number in range(150)]
    for path in paths:
        path.write_bytes(damaged(point_onnx, rng))
    found = in_node([run for path in paths for run in runs_of(path, {"numSteps": 2})])
    errors = [outcome for outcome in found if "error" in outcome]
    assert 20 < len(errors) < 140
    for outcome in errors:
        assert outcome["error"] == "InputError" and len(outcome["message"].splitlines()) == 1, outcome
    assert all(len(outcome["samples"]) == 4 for outcome in found if "samples" in outcome)


def test_a_graph_with_other_inputs_is_refused(
    point_onnx, conditional_file, metadata_of, with_metadata, tmp_path
):
    path = tmp_path / "sampler.onnx"
    path.write_bytes(with_metadata(conditional_file.read_bytes(), metadata_of(point_onnx)))
    (outcome,) = in_node(runs_of(path, {}))
    assert (
        outcome["error"] == "InputError"
        and "but needs x float32 [batch, 2], t int64 [batch]" in outcome["message"]
    )


def npm(*arguments, cwd):
    result = subprocess.run(
        ["npm", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


CONSUMER = """
import { type SampleOptions, InputError, Sampler, SAMPLERS } from "ray-ddpm";
declare const ort: Parameters<typeof Sampler.open>[1]["ort"];
const { signal } = new AbortController();
const options: SampleOptions = { seed: 3n, labels: ["cat", 1], spacing: "logsnr", signal };
const sampler: Sampler = await Sampler.open(new Uint8Array(), { ort });
const samples: Float32Array = await sampler.sample(4, { ...options, onRow: (done, total) => done / total });
const shape: number[] = sampler.spec.data.shape;
// @ts-expect-error: not a spacing
await sampler.sample(4, { spacing: "even" });
// @ts-expect-error: not an option
await sampler.sample(4, { steps: 4 });
export const all = [samples, shape, SAMPLERS.length, InputError];
"""


def test_the_package_has_types_and_runs_where_it_is_installed(files, tmp_path, repository):
    copy = tmp_path / "javascript"
    shutil.copytree(JAVASCRIPT, copy, ignore=shutil.ignore_patterns("node_modules", "types"))
    (copy / "node_modules").symlink_to(JAVASCRIPT / "node_modules")
    shutil.copy(repository / "LICENSE", tmp_path)
    packed = copy / npm("pack", "--silent", cwd=copy).split()[-1]
    with tarfile.open(packed) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {name.split("/")[1] for name in names} == {"LICENSE", "README.md", "package.json", "src", "types"}
    about = json.loads((copy / "package.json").read_text())
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert (about["version"], about["license"]) == (project["version"], project["license"])
    assert "dependencies" not in about

    place = tmp_path / "consumer" / "node_modules" / "ray-ddpm"
    place.parent.mkdir(parents=True)
    (tmp_path / "unpacked" / "package").rename(place)
    consumer = place.parents[1]
    for module in ("onnxruntime-node", "onnxruntime-common"):
        (place.parent / module).symlink_to(JAVASCRIPT / "node_modules" / module)
    (consumer / "package.json").write_text('{"type": "module"}')
    (consumer / "consumer.ts").write_text(CONSUMER)
    compiler = JAVASCRIPT / "node_modules" / "typescript" / "bin" / "tsc"
    options = {"strict": True, "noEmit": True, "target": "es2022", "module": "nodenext", "types": []}
    (consumer / "tsconfig.json").write_text(
        json.dumps({"compilerOptions": options, "files": ["consumer.ts"]})
    )
    result = node(compiler, cwd=consumer)
    assert result.returncode == 0, result.stdout
    (consumer / "draw.js").write_text(
        'import { readFileSync } from "node:fs";\n'
        'import * as ort from "onnxruntime-node";\n'
        'import { Sampler } from "ray-ddpm";\n'
        "const sampler = await Sampler.open(readFileSync(process.argv[2]), { ort });\n"
        "console.log(JSON.stringify({ samples: Array.from(await sampler.sample(4)) }));\n"
    )
    result = node("draw.js", files["points"], cwd=consumer)
    assert result.returncode == 0, result.stderr
    expected = Sampler(files["points"], provider="cpu").sample(4)
    assert_same(json.loads(result.stdout), expected)


def test_the_types_are_right_and_the_lock_file_names_no_registry():
    npm("run", "check", "--silent", cwd=JAVASCRIPT)
    assert '"resolved"' not in (JAVASCRIPT / "package-lock.json").read_text()
