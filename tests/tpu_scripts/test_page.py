"""docs/tpu.md: its commands are accepted, its settings and files exist."""

import re
import subprocess

from tests.tpu_scripts.cloud import (
    ROOT,
    SCRIPTS,
    VERBS,
    Cloud,
)


def page_commands() -> str:
    """The shell of docs/tpu.md, a command a line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/tpu.md").read_text(), re.M | re.S)
    return "".join(blocks).replace("\\\n", " ")


def test_every_command_of_the_page_is_accepted(cloud: Cloud):
    """The page's variables and scripts, in order, each as a dry run."""
    lines = page_commands().splitlines()
    keep = [line for line in lines if re.match(r"(PROJECT|BUCKET|NAME|ZONE)=|tpu_scripts/", line)]
    scripts = [line for line in keep if line.startswith("tpu_scripts/")]
    assert {re.split(r"[/.]", line)[1] for line in scripts} == set(VERBS)
    shell = [
        "set -eu",
        *(re.sub(r"^(tpu_scripts/\w+\.sh)", r"\1 --dry-run", line) for line in keep),
    ]
    result = subprocess.run(
        ["bash", "-c", "\n".join(shell)],
        cwd=cloud.root,
        env=cloud.environment(HF_TOKEN="hf_x"),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert cloud.calls() == []
    assert result.stdout.count("queued-resources create") == 3
    assert "'--command=bash jaxtune-code/tpu_scripts/host_run.sh start " in result.stdout
    assert "--workdir=gs://my-project-jaxtune/runs/first" in result.stdout


def test_every_setting_and_file_of_the_page_exists():
    from jaxtune.config import default_config

    commands = page_commands()
    keys = set(re.findall(r"--config\.([a-z_.]+)=", (ROOT / "docs/tpu.md").read_text()))
    assert "model.path" in keys
    for key in keys:
        section = default_config()
        for part in key.split("."):
            assert part in section, key
            section = section[part]
    for path in re.findall(r"--config=(\S+)", commands):
        assert (ROOT / path).is_file()
    types = set(re.findall(r"--(?:accelerator-type|topology)=(\S+)", commands))
    assert types == {"v5litepod-8", "v5p-64"}


def test_what_setup_packs_is_in_the_checkout():
    packed = re.search(r"^    jaxtune configs .*LICENSE", (SCRIPTS / "setup.sh").read_text(), re.M)
    assert packed
    assert all((ROOT / name).exists() for name in packed[0].split())
