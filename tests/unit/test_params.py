import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.errors import InputError
from darkroom.params import Params, load_params
from darkroom.training.ema import decay_at

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text()


def load(tmp_path, pattern=None, replacement=""):
    path = tmp_path / "params.yaml"
    text, count = re.subn(pattern, replacement, TEXT, count=1, flags=re.MULTILINE) if pattern else (TEXT, 1)
    assert count == 1, f"{pattern} is not in params.yaml"
    path.write_text(text)
    return load_params(path)


def test_the_projects_own_parameters_load_and_are_frozen(tmp_path):
    params = load(tmp_path)
    with pytest.raises(Exception, match="frozen"):
        params.train.steps = 1


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        ("ema_decay", "ema_deacy", 'params.yaml: train.ema_deacy = 0.99: unknown key; did you mean "ema_decay"?'),
        ("^sample:", "smaple:", 'params.yaml: smaple: unknown key; did you mean "sample"?'),
        ("image_size: .*", "", "params.yaml: data.image_size: missing; expected a whole number"),
        ("  checksum: .*", "", "params.yaml: data.checksum: missing; expected a text or null"),
        ("checksum: null", "checksum: md5:12", "data.checksum = 'md5:12': expected sha256: or md5: and as many"),
        (
            "(?s)(train:.*?)batch_size: 64",
            r"\1batch_size: 0",
            "params.yaml: train.batch_size = 0: expected at least 1",
        ),
        ("horizontal_flip: false", "horizontal_flip: 0", "train.horizontal_flip = 0: expected true or false"),
        ("test_fraction: 0.2", "test_fraction: lots", "data.test_fraction = 'lots': expected a number"),
        ("ema_decay: .*", "ema_decay: 1.5", "train.ema_decay = 1.5: expected less than 1"),
        ("sampler: dpmpp_2m_sde", "sampler: dpmp_2m_sde", 'did you mean "dpmpp_2m_sde"?'),
        ("spacing: trailing", "spacing: even", "sample.spacing = 'even': expected trailing or leading or linspace or"),
        ("eta: 0.0", "eta: 0.5", "sample.eta = 0.5: only sampler ddim has it: expected 0.0 with dpmpp_2m"),
        ("guidance_interval: null", "guidance_interval: 3.0", "sample.guidance_interval = 3.0: expected a list"),
        ("guidance_interval: null", "guidance_interval: [1.0]", "= [1.0]: expected at least 2 entries"),
        ("guidance_interval: null", "guidance_interval: [2.0, 1.0]", "expected [low, high] with low < high"),
        ("prediction: eps", "prediction: x0", "train.prediction = 'x0': expected eps or x_0 or v; did you mean"),
        ("lr_decay: \\w+", "lr_decay: linear", "train.lr_decay = 'linear': expected constant or cosine"),
        (
            "attention_resolutions: .*",
            "attention_resolutions: [16]",
            "train.model.attention_resolutions = [16]: resolution 16 does not occur: expected some of [8, 4]",
        ),
        ("norm_groups: .*", "norm_groups: 5", "expected every entry a multiple of norm_groups = 5"),
        ("head_channels: .*", "head_channels: 36", "train.model.head_channels = 36: expected a divisor of 64"),
        (
            "(?s)attention_resolutions: .*?head_channels: 16",
            "attention_resolutions: []\n    head_channels: 100",
            "train.model.head_channels = 100: expected a divisor of 64",
        ),
        (
            "name: cosine.*\n    num_timesteps: 1000",
            "name: linear\n    num_timesteps: 20",
            "num_timesteps = 20: the linear",
        ),
        ("image_size: 8 ", "image_size: 9 ", "expected data.image_size = 9 to be a multiple of 2"),
        ("label_dropout: .*", "label_dropout: 0.0", "guidance needs the null class that label dropping trains"),
        (
            "(?s)source: digits(.*?)num_classes: 10",
            r"source: images\1num_classes: 0",
            "train.label_dropout = 0.1: data.num_classes = 0, so there are no labels to drop: expected 0.0",
        ),
        (
            "(?s)source: digits(.*?)num_classes: 10(.*?)label_dropout: 0.1",
            r"source: images\1num_classes: 0\2label_dropout: 0.0",
            "sample.guidance_scale = 2.0: data.num_classes = 0, so there is nothing to guide towards: expected 1.0",
        ),
        ("num_classes: 10", "num_classes: 12", 'data.num_classes = 12: source "digits" has 10 labels: expected 10'),
        (
            "num_timesteps: 1000",
            "num_timesteps: 10",
            "sample.steps = 20: expected at most train.schedule.num_timesteps",
        ),
        ("num_images: 1797", "num_images: 9", "sample.num_images = 9: expected at least one image per class"),
        (
            "neighbours: 3",
            "neighbours: 1797",
            "sample.num_images = 1797: expected at least 1798, which FID's extrapolation",
        ),
        ("kid_subset_size: .*", "kid_subset_size: 5000", "expected less than sample.num_images = 1797"),
        (r"seeds: \[.*\]", "seeds: [0, 1, 0]", "sample.seeds = [0, 1, 0]: expected different seeds"),
        (r"seeds: \[.*\]", "seeds: []", "sample.seeds = []: expected at least 1"),
        (
            'inception_sha256: "6726825d"',
            "inception_sha256: 6726",
            "reference.inception_sha256 = 6726: expected a text",
        ),
        (
            'inception_sha256: "6726825d"',
            'inception_sha256: "672"',
            "'672': expected a sha256 or its first 8 digits or m",
        ),
        (
            "published_statistics: null",
            'published_statistics: "abcdef01"',
            "reference.published_statistics = 'abcdef01': only extractor: inception has published ones",
        ),
        ("name: digits", "name: a/b", "registry.name = 'a/b': expected letters, digits"),
        ("learning_rate: .*", "learning_rate: .inf", "reference.learning_rate = inf: expected a finite number"),
        ("(?s)^sample:.*", "sample: 3", "sample = 3: expected a group of keys"),
        ("  seed: 0", "  seed: 0\n  seed: 1", 'params.yaml:11: key "seed" appears twice'),
        ("^data:", "data: [", "params.yaml:"),
        ("(?s).*", "", "params.yaml: expected the groups data, validate"),
    ],
)
def test_what_cannot_work_is_refused_with_key_value_and_what_is_allowed(tmp_path, pattern, replacement, message):
    with pytest.raises(InputError) as caught:
        load(tmp_path, pattern, replacement)
    assert message in str(caught.value)


def test_a_decay_that_the_warm_up_never_reaches_is_warned_of(tmp_path):
    assert load(tmp_path).train.warnings() == [], "the default acts"
    (warning,) = load(tmp_path, "ema_decay: 0.99 ", "ema_decay: 0.995 ").train.warnings()
    reached = 1401 / 1410
    assert decay_at(1400, 0.9999) == decay_at(1400, 0.995) == reached
    assert warning.startswith("train.ema_decay = 0.995: is never used")
    assert f"{reached:.4f} after 1400 steps" in warning
    for recipe in sorted((ROOT / "params").glob("*.yaml")):
        assert load_params(recipe).train.warnings() == [], recipe


def test_an_average_is_chosen_only_where_there_are_snapshots(tmp_path):
    allowed = "train.ema_snapshots = 0, so there is nothing to choose from"
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("ema: trained", "ema: auto").replace("ema_snapshots: 4", "ema_snapshots: 0")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=f"sample.ema = 'auto': {allowed}"):
        load_params(tmp_path / "params.yaml")


def test_one_typo_is_one_line(tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path, "guidance_scale", "guidence_scale")
    assert str(caught.value) == 'params.yaml: sample.guidence_scale = 2.0: unknown key; did you mean "guidance_scale"?'


@pytest.mark.parametrize("group", ["train", "sample"])
@pytest.mark.parametrize("precision", ["fp16", "float16", "half"])
def test_half_precision_is_refused_with_the_reason(tmp_path, group, precision):
    with pytest.raises(InputError, match=rf"{group}.precision = '{precision}': fp16 overflows .* use fp32 or bf16"):
        load(tmp_path, rf"(?s)^({group}:.*?)precision: \w+", rf"\1precision: {precision}")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/params\.yaml: no such file"):
        load_params(tmp_path / "nowhere" / "params.yaml")


@given(st.floats(min_value=1e-8, max_value=0.5))
def test_every_spelling_of_a_float_is_a_float(tmp_path_factory, value):
    for spelling in (repr(value), f"{value:e}", f"{value:.12f}1", f"{value:.0e}".replace("e-0", "e-")):
        params = load(
            tmp_path_factory.mktemp("p"), r"(?s)^(train:.*?)learning_rate: \S+", rf"\1learning_rate: {spelling}"
        )
        assert params.train.learning_rate == float(spelling)


def test_unlabelled_data_needs_no_more_than_that(tmp_path):
    pattern = "(?s)source: digits(.*?)num_classes: 10(.*?)label_dropout: 0.1(.*?)guidance_scale: 2.0"
    params = load(tmp_path, pattern, r"source: images\1num_classes: 0\2label_dropout: 0.0\3guidance_scale: 1.0")
    assert params.data.num_classes == 0


ALIASES = "x0: &x0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"\Z", ALIASES, r"params.yaml:\d+: more than 200000 values, aliases counted"),
        (r"\Z", "deep: " + "[" * 20_000 + "]" * 20_000, r"params.yaml:\d+: more than 32 levels deep"),
        (r"\Z", "# " + "x" * 300_000, "params.yaml: more than 262144 bytes"),
        (r"\Z", "a: \0", r"params.yaml:\d+: character 0 is not allowed"),
        (r"\Z", "? [a]\n: b", r"params.yaml:\d+: found unhashable key"),
        (r"\Z", "long: " + "v" * 100_000, r"params.yaml: long = 'v+\.\.\.v+': unknown key; expected one of .*"),
        (r"\Z", "hex: 0x" + "f" * 100_000, "params.yaml: hex = a number of thousands of digits: unknown key; .*"),
        (r"\Z", "a: *" + "b" * 5000, r"params.yaml:\d+: found undefined alias 'b+…"),
        (
            "sampler: .*",
            "sampler: 0x" + "f" * 9000,
            "params.yaml: sample.sampler = a number of .*: expected ddpm .*",
        ),
        ("^  steps: 1400", "  steps: 1" + "0" * 23, "params.yaml: train.steps = 10{23}: expected at most 1000000000"),
        ("num_images: 1797", f"num_images: {2**63}", f"params.yaml: sample.num_images = {2**63}: expected at most .*"),
        (
            "learning_rate: 3.0e-3",
            "learning_rate: 1" + "0" * 400,
            r"params.yaml: train.learning_rate = 10+\.\.\..*",
        ),
        (
            r"(?s)(train:.*?)channels: \[32, 64\]",
            r"\1channels: [" + "a," * 50_000 + "]",
            r"params.yaml: train.model.channels = \['a', .* \.\.\.\]: expected at most 9 entries",
        ),
    ],
)
def test_a_file_that_means_harm_is_one_short_line_at_once(tmp_path, pattern, replacement, message):
    start = time.process_time()
    with pytest.raises(InputError) as caught:
        load(tmp_path, pattern, replacement)
    assert re.fullmatch(message, str(caught.value))
    assert len(str(caught.value)) < 400
    assert time.process_time() - start < 10


def test_mistakes_beyond_twenty_are_counted(tmp_path):
    with pytest.raises(InputError) as caught:
        load(tmp_path, r"\Z", "".join(f"key{i}: {i}\n" for i in range(5000)))
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (21, "params.yaml: and 4980 mistakes more")


def numbers(schema, definitions):
    """Every number in a JSON schema, with its name."""
    for name, value in schema.items():
        if name == "$ref":
            yield from numbers(definitions[value.split("/")[-1]], definitions)
        elif isinstance(value, dict):
            if value.get("type") in ("integer", "number"):
                yield name, value
            yield from numbers(value, definitions)
        elif isinstance(value, list):
            yield from (pair for item in value if isinstance(item, dict) for pair in numbers({name: item}, definitions))


def test_every_number_has_two_bounds_that_64_bits_hold():
    schema = Params.model_json_schema()
    found = list(numbers(schema["properties"], schema["$defs"]))
    assert len(found) > 40
    for name, value in found:
        low = value.get("minimum", value.get("exclusiveMinimum"))
        high = value.get("maximum", value.get("exclusiveMaximum"))
        assert "enum" in value or -(2**63) <= low <= high <= 2**63, name
