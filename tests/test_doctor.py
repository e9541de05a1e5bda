"""The doctor: each fault is found and named, no secret is shown, nothing hangs."""

import json
import os
from pathlib import Path

import pytest

from jaxtune import cli, doctor
from jaxtune.errors import ConfigError
from jaxtune.flags import Chips

NONE, POD = Chips(0, ""), Chips(4, "v5p")


def test_this_machine_is_examined_from_end_to_end(capfd):
    code = cli.main(["doctor", "--json"])
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert code == (0 if found["sound"] else 2)
    names = [line["name"] for line in found["lines"]]
    assert names[0] == "jaxtune"
    assert {"versions", "accelerator", "devices", "compiled programs", "processor"} <= set(names)
    assert all(line["state"] in ("ok", "note", "problem") for line in found["lines"])
    assert "cpu" in next(line["text"] for line in found["lines"] if line["name"] == "devices")
    assert err == ""


def test_the_table_goes_where_it_can_be_piped(capfd):
    doctor.show([doctor.Line("processor", "ok", "2 cores")])
    assert capfd.readouterr() == ("ok  processor  2 cores\n", "")


@pytest.mark.parametrize(
    ("chips", "gpu", "libtpu", "cuda", "state", "word"),
    [
        (NONE, False, False, False, "note", "runs use the processor"),
        (NONE, False, True, False, "note", "jaxtune plan"),
        (POD, False, True, False, "ok", "4 TPU v5p chips"),
        (POD, False, False, False, "problem", "no libtpu"),
        (NONE, True, False, True, "ok", "GPU"),
        (NONE, True, True, False, "problem", "no plugin"),
    ],
)
def test_chips_and_what_is_installed_for_them(chips, gpu, libtpu, cuda, state, word):
    line = doctor.hardware(chips, gpu, libtpu, cuda)
    assert line.state == state
    assert word in line.text
    assert bool(line.fix) == (state == "problem")


def test_versions_that_do_not_match():
    states = [line.state for line in doctor.versions({"jax": "0.10.2", "jaxlib": "0.10.1"}, NONE)]
    assert states == ["ok", "problem"]
    same = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.1"}
    assert [line.state for line in doctor.versions(same, NONE)] == ["ok", "note"]
    assert [line.state for line in doctor.versions(same, POD)] == ["ok", "problem"]


def _asking(monkeypatch, script: str, seconds: float = 60):
    monkeypatch.setattr(doctor, "_ASK", script)
    monkeypatch.setattr(doctor, "_SECONDS", seconds)


def test_a_device_that_never_answers_is_given_up(monkeypatch):
    _asking(monkeypatch, "import time; time.sleep(600)", 0.5)
    (line,) = doctor.devices({}, POD, False)
    assert line.state == "problem"
    assert "within 0.5 s" in line.text


def test_a_tpu_that_another_process_holds_is_named(monkeypatch):
    _asking(
        monkeypatch,
        "raise RuntimeError('ABORTED: The TPU is already in use by process with pid 4321.')",
    )
    (line,) = doctor.devices({}, POD, False)
    assert line.state == "problem"
    assert "4321" in line.fix


def test_an_accelerator_that_jax_does_not_use(monkeypatch):
    told = {"platform": "cpu", "kind": "cpu", "count": 1, "memory": None, "compute": ""}
    _asking(monkeypatch, f"print({json.dumps(json.dumps(told))})")
    assert [line.state for line in doctor.devices({}, NONE, False)] == ["ok"]
    (line,) = doctor.devices({"JAX_PLATFORMS": "cpu"}, POD, False)
    assert (line.state, line.fix) == ("problem", "unset JAX_PLATFORMS")


@pytest.mark.parametrize(("compute", "word"), [("9.0", "with fp8"), ("8.0", "no fp8")])
def test_fp8_of_a_gpu(monkeypatch, compute, word):
    told = {"platform": "gpu", "kind": "H", "count": 1, "memory": 2**34, "compute": compute}
    _asking(monkeypatch, f"print({json.dumps(json.dumps(told))})")
    lines = doctor.devices({}, NONE, True)
    assert "1 x H of 16.0 GiB" in lines[0].text
    assert word in lines[1].text


def test_keys_are_present_or_absent_and_never_shown(tmp_path: Path):
    secret = "canary-3f9a"
    (tmp_path / "google.json").write_text(secret)
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {secret}")
    environment = {
        "HF_TOKEN": secret, "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "google.json"),
        "WANDB_API_KEY": secret, "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    lines = doctor.access(environment, tmp_path)
    assert secret not in str(lines)
    assert all("present" in line.text for line in lines)
    assert "offline" in lines[1].text
    assert all("absent" in line.text for line in doctor.access({}, tmp_path / "nobody"))


def test_flags_say_whose_they_are():
    ours = doctor.flags.defaults({}, POD, gpu=False)
    (line,) = doctor.tpu_flags(ours, POD, [], lambda text: "")
    assert line.text == f"{ours['LIBTPU_INIT_ARGS']} (jaxtune's)"
    (line,) = doctor.tpu_flags({"LIBTPU_INIT_ARGS": "--mine=1"}, POD, [], lambda text: "")
    assert line == doctor.Line("LIBTPU_INIT_ARGS", "ok", "--mine=1 (yours)")
    mine = ours | {"XLA_FLAGS": "--x", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "true"}
    lines = {line.name: line.text for line in doctor.settings(mine, POD, False)}
    assert lines["XLA_FLAGS"] == "--x (yours)"
    assert lines["JAX_CPU_ENABLE_ASYNC_DISPATCH"] == "true (yours)"


def test_flags_of_chips_that_are_not_here():
    """One line a chip, of what a run there would have; each form is asked about once."""
    asked = []
    kinds = doctor.flags.GENERATIONS
    environment = {"LIBTPU_INIT_ARGS": "--mine=1"}
    lines = doctor.tpu_flags(environment, NONE, kinds, lambda text: asked.append(text) or "")
    assert [line.name for line in lines[1:]] == [f"flags of {kind}" for kind in kinds]
    for kind, line in zip(kinds, lines[1:], strict=True):
        whole = doctor.flags.libtpu_arguments(kind, "--mine=1")
        assert line.text == f"{whole} (yours and jaxtune's)"
        assert whole.startswith("--mine=1 --xla")
    assert sorted(asked) == sorted(set(asked))
    (line,) = doctor.tpu_flags({}, NONE, ["v6e"], lambda text: None)
    assert line.text.endswith("(jaxtune's, not checked: no libtpu here)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--xla_tpu_enable_data_parallel_all_reduce_opt=true", ""),
        ("--xla_bogus=1", "Unknown command line flag 'xla_bogus'"),
        ("--xla_tpu_scoped_vmem_limit_kib=much", "Illegal value 'much' specified for flag"),
        ("words", "words is no flag"),
    ],
)
def test_libtpu_itself_is_asked_about_its_flags(arguments, said):
    pytest.importorskip("libtpu")
    found = doctor.refused_flags(arguments)
    assert found is not None
    assert (said in found) if said else (found == "")


def test_a_flag_that_libtpu_refuses_is_a_problem():
    environment = {"LIBTPU_INIT_ARGS": "--xla_bogus=1"}
    (line,) = doctor.tpu_flags(environment, NONE, [], lambda text: "Unknown flag 'xla_bogus'")
    assert line.state == "problem"
    assert "Unknown flag 'xla_bogus'" in line.text
    assert "LIBTPU_INIT_ARGS" in line.fix


def test_an_unknown_flag_of_xla_is_named_as_one():
    lines = doctor.devices({**os.environ, "XLA_FLAGS": "--xla_bogus=1"}, NONE, False)
    assert lines == [
        doctor.Line(
            "devices",
            "problem",
            "Unknown flag in XLA_FLAGS: --xla_bogus=1",
            "XLA_FLAGS without it, or unset",
        )
    ]


def test_the_chips_that_can_be_asked_for(capsys):
    assert cli.main(["doctor", "--chip=v99"]) == 2
    assert "v5e" in capsys.readouterr().err


def test_a_folder_for_programs_that_cannot_be_written(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("")
    assert doctor.cache(tmp_path / "new" / "folder").state == "ok"
    assert doctor.cache(Path("/proc/none")).state == "problem"
    assert doctor.cache(Path("")).state == "note"


def test_processors_are_read(tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("model name : Fast One\nflags : fpu avx2 avx512_bf16\n")
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\n")
    lines = {line.name: line for line in doctor.processor(tmp_path)}
    assert "Fast One, avx512_bf16, avx2" in lines["processor"].text
    assert lines["memory"] == doctor.Line("memory", "note", "1.0 GiB free of 8.0 GiB")
    (tmp_path / "cpuinfo").write_text("flags : fpu avx2\n")
    assert "no bfloat16" in doctor.processor(tmp_path)[0].text


def test_one_problem_is_one_line_and_exit_code_2():
    lines = [doctor.Line("a", "ok", "x"), doctor.Line("b", "problem", "y", "z")]
    with pytest.raises(ConfigError, match=r"b: y; try: z") as error:
        doctor.require_sound(lines)
    assert error.value.exit_code == 2
    assert doctor.as_json(lines)["sound"] is False
    doctor.require_sound(lines[:1])
