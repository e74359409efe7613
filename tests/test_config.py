"""The configuration: one file, the environment over it, and every mistake at once."""

import itertools
import tomllib
from pathlib import Path

import pytest
from pydantic import SecretStr

from agent.cli import main
from agent.config import Config, ConfigError, load, resolved, to_toml
from agent.config.loading import _leaves

EXAMPLE = Path(__file__).parent.parent / "deploy" / "gapstream.example.toml"


def written(folder: Path, text: str) -> Path:
    path = folder / "gapstream.toml"
    path.write_text(text)
    return path


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def mistakes_of(*arguments) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    head, *mistakes = str(error.value).split("\n  ")
    assert head.endswith(f"has {len(mistakes)} mistake(s):")
    return mistakes


def test_without_a_file_every_key_has_its_default():
    assert load(None, {}) == Config()


def test_the_environment_wins_over_the_file_and_overrides_over_both(tmp_path):
    path = written(tmp_path, "[task]\nsamples = 1\nbytes = 1\n[http]\nport = 1")
    env = {"GAPSTREAM_TASK__SAMPLES": "2", "GAPSTREAM_TASK__BYTES": "2", "PATH": "/bin"}
    config = load(path, env, {"task.samples": "3"})
    assert (config.task.samples, config.task.bytes, config.http.port) == (3, 2, 1)


def test_text_from_the_environment_is_read_as_the_keys_type():
    config = load(
        None,
        {
            "GAPSTREAM_HTTP__ENABLED": "false",
            "GAPSTREAM_TASK__IDLE_S": "1.5",
            "GAPSTREAM_SOURCE__ARCHIVE__CLASS_ORDER": '["cat", "dog"]',
            "GAPSTREAM_EVALUATION__TEST_ARCHIVE": "",
            "GAPSTREAM_SOURCE__KAFKA__TOPICS": "images, more-images",
            "GAPSTREAM_MODEL__PROMPT": "[{}]",
        },
    )
    assert config.http.enabled is False
    assert config.task.idle_s == 1.5
    assert config.source.archive.class_order == ("cat", "dog")
    assert config.evaluation.test_archive is None
    assert config.source.kafka.topics == ("images", "more-images")
    assert config.model.prompt == "[{}]"


def test_relative_paths_in_a_file_are_relative_to_it(tmp_path):
    path = written(
        tmp_path,
        """
        [state]
        path = "kept"
        [model]
        pretrained = "weights/clip.pt"
        [source.archive]
        path = "/absolute/images.zip"
        class_order_file = ""
        [evaluation]
        test_archive = "bundled"
        probe_archive = "../probe"
        """,
    )
    config = load(path, {"GAPSTREAM_SOURCE__ARCHIVE__CLASS_ORDER_FILE": "here.txt"})
    assert config.state.path == tmp_path / "kept"
    assert config.model.pretrained == str(tmp_path / "weights/clip.pt")
    assert config.source.archive.path == Path("/absolute/images.zip")
    assert config.source.archive.class_order_file == Path("here.txt")
    assert config.evaluation.test_archive == "bundled"
    assert config.evaluation.probe_archive == tmp_path / "../probe"


def test_an_open_clip_tag_is_no_path(tmp_path):
    assert load(written(tmp_path, '[model]\npretrained = "openai"'), {}).model.pretrained == "openai"


def test_all_mistakes_are_reported_at_once_with_full_names(tmp_path):
    # given a file and an environment with a mistake of every kind
    path = written(
        tmp_path,
        """
        samples = 3
        [task]
        sampels = 4
        samples = "many"
        [source.archive]
        path = 3
        order = "sorted"
        [model]
        prompt = "no slot"
        [http]
        port = 70000
        [spool]
        max_bytes = 5
        """,
    )
    env = {
        "GAPSTREAM_TASK_BYTES": "3",
        "GAPSTREAM_FOO": "1",
        "GAPSTREAM_AGENT__LOG_LEVEL": "LOUD",
        "GAPSTREAM_SOURCE__ARCHIVE__CLASS_ORDER": '["cat"',
    }

    # when
    mistakes = mistakes_of(path, env, {"state.keep": "3"})

    # then
    expected = [
        "foo (GAPSTREAM_FOO): there is no such key",
        "task_bytes (GAPSTREAM_TASK_BYTES): there is no such key; did you mean task.bytes?",
        'source.archive.class_order (GAPSTREAM_SOURCE__ARCHIVE__CLASS_ORDER): got ["cat", '
        'expected a list as in TOML, like ["cat", "dog"]',
        "state.keep (--set): there is no such key; did you mean state.keep_commits?",
        "samples: there is no such key; did you mean task.samples?",
        "task.sampels: there is no such key; did you mean task.samples?",
        "task.samples: got 'many', expected: a valid integer, unable to parse string as an integer",
        "source.archive.order: got 'sorted', expected: 'classes', 'shuffled' or 'blurry'",
        "model.prompt: got 'no slot', expected exactly one {} where the class name goes",
        "http.port: got 70000, expected: less than or equal to 65535",
        "spool.max_bytes: got 5, expected: greater than or equal to 1048576",
        "agent.log_level (GAPSTREAM_AGENT__LOG_LEVEL): got 'LOUD', expected: 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
    ]
    assert set(expected) <= set(mistakes)
    (other,) = set(mistakes) - set(expected)
    assert other.startswith("source.archive.path: got 3, expected: 'bundled' or ")


def test_a_cross_check_names_its_section():
    off = {f"GAPSTREAM_TASK__{key}": "0" for key in ("SAMPLES", "BYTES", "BOUNDARIES")}
    (mistake,) = mistakes_of(None, off)
    assert mistake.startswith("task: no rule would ever cut")


def test_a_value_where_a_section_belongs_is_a_mistake(tmp_path):
    path = written(tmp_path, "task = 3")
    mistakes = mistakes_of(path, {"GAPSTREAM_TASK__SAMPLES": "3"})
    assert [mistake.partition(":")[0] for mistake in mistakes] == ["task"]


def test_a_syntax_error_names_file_and_line(tmp_path):
    path = written(tmp_path, "[task]\nsamples = = 3")
    (mistake,) = mistakes_of(path, {})
    assert mistake.startswith(f"{path} is not TOML: ") and "line 2" in mistake


def test_a_file_that_cannot_be_read_is_said_with_the_other_mistakes(tmp_path):
    mistakes = mistakes_of(tmp_path / "none.toml", {"GAPSTREAM_HTTP__PORT": "-1"})
    assert mistakes[0] == f"{tmp_path / 'none.toml'} cannot be read: No such file or directory"
    assert mistakes[1].startswith("http.port (GAPSTREAM_HTTP__PORT): got '-1'")
    (tmp_path / "latin.toml").write_bytes(b'[model]\nname = "\xe9"')
    assert "is not UTF-8" in mistakes_of(tmp_path / "latin.toml", {})[0]


def test_the_printed_configuration_reads_back_as_the_same(tmp_path):
    config = load(None, {}, {"source.archive.class_order": '["a \\"quoted\\" name", "ü"]', "state.path": "/state"})
    assert load(written(tmp_path, to_toml(config)), {}) == config


def test_secrets_are_masked_wherever_the_configuration_is_shown():
    class WithSecret(Config):
        password: SecretStr = SecretStr("open sesame")

    assert "open sesame" not in str(resolved(WithSecret()))


def test_a_secret_is_not_printed_with_a_mistake(tmp_path):
    path = written(tmp_path, "[source.kafka.security]\npassword = 12345")
    (mistake,) = mistakes_of(path, {})
    assert mistake == "source.kafka.security.password: got a secret, expected: a valid string"


def test_a_secret_may_begin_with_anything():
    config = load(None, {"GAPSTREAM_SOURCE__KAFKA__SECURITY__PASSWORD": "[not, a list"})
    assert config.source.kafka.security.password.get_secret_value() == "[not, a list"


def test_the_example_file_is_every_key_with_its_default_and_its_explanation():
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text == to_toml(Config(), documented=True), "renew it: gapstream config --example > " + str(EXAMPLE)
    assert flat(tomllib.loads(text)).keys() == {key for key, _ in _leaves()}
    expected = {key: "" if value is None else value for key, value in flat(resolved(Config())).items()}
    assert flat(tomllib.loads(text)) == expected


def test_every_key_is_explained():
    lines = to_toml(Config(), documented=True).splitlines()
    keys = [(before, line) for before, line in itertools.pairwise(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) == len([*_leaves()])
    assert [line for before, line in keys if not before.startswith("#")] == []


def test_a_precision_that_is_not_known_is_refused_with_those_that_are():
    mistakes = mistakes_of(None, {}, {"release.precisions": "fp16, int4", "serve.precision": "int4"})
    assert mistakes == [
        "release.precisions (--set): got 'int4', expected: 'fp16' or 'int8'",
        "serve.precision (--set): got 'int4', expected: 'fp32', 'fp16', 'int8' or 'auto'",
    ]


def test_providers_are_tensorrt_and_openvino_with_its_device():
    kept = load(None, {}, {"serve.providers": "tensorrt, openvino:GPU.1, openvino"}).serve.providers
    assert kept == ("tensorrt", "openvino:GPU.1", "openvino")
    expected = "expected: 'tensorrt', 'openvino' or, say, 'openvino:GPU'; CUDA and the CPU are serve.device"
    assert mistakes_of(None, {}, {"serve.providers": "cuda"}) == [f"serve.providers (--set): got 'cuda', {expected}"]


def test_credentials_inside_urls_are_shown_to_nobody(capsys):
    url = "https://me:s3cret@idp.example.com/token"
    env = {
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__PROTOCOL": "SASL_SSL",
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__MECHANISM": "OAUTHBEARER",
        "GAPSTREAM_SOURCE__KAFKA__SECURITY__TOKEN_URL": url,
        "GAPSTREAM_SOURCE__KAFKA__IMAGES__ALLOWED": '["https://me:s3cret@images.example.com/"]',
    }
    config = load(None, env)
    assert config.source.kafka.security.token_url == url
    shown = f"{to_toml(config)}{resolved(config)}"
    assert "s3cret" not in shown and "https://***@idp.example.com/token" in shown

    assert main(["config", "--set", "source.kafka.images.allowed=https://me:s3cret@host"]) == 78
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err and "https://***@host" in said.err
