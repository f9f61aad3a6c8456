"""What the repository says about itself is true: settings, commands, links, pins, images."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_command

from app.cli import cli
from app.settings import Settings
from app.spec.compression import STEP_CLASSES

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", text, re.MULTILINE))
    variables = {
        name.upper() if name in ("database_url", "redis_url") else f"MODELPRESS_{name.upper()}": field.default
        for name, field in Settings.model_fields.items()
    }
    assert rows.keys() == variables.keys()
    for name, default in variables.items():
        shown = rows[name]
        if shown.startswith("`"):
            assert shown.strip("`") == f"{default:g}" if isinstance(default, float) else str(default), name
        elif match := re.fullmatch(r"(\d+) (MiB|GiB)", shown):
            assert default == int(match[1]) * {"MiB": 2**20, "GiB": 2**30}[match[2]], name
        elif shown == "empty":
            assert not default, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_links_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    commands = set(get_command(cli).commands)  # type: ignore[attr-defined]
    for target in re.findall(r"(?:^ +|`)make ([a-z]+)", text, re.MULTILINE):
        assert target in make_targets(), f"make {target}"
    for word in re.findall(r"(?:^ +|`|bin/)modelpress ([a-z-]+)", text, re.MULTILINE):
        assert word in commands, f"modelpress {word}"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_every_technique_has_its_row_in_the_page_on_techniques() -> None:
    rows = re.findall(r"^\| `([a-z.0-9_]+)` \|", (ROOT / "docs" / "techniques.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(step.model_fields["technique"].default for step in STEP_CLASSES)


def test_ci_runs_what_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = re.findall(r"^make ([a-z]+)", script, re.MULTILINE)
    assert targets
    for target in targets:
        assert f"make {target}" in (ROOT / "README.md").read_text()
        assert f"make {target}" in workflow
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


def test_make_alone_explains_the_targets() -> None:
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make (\w+)", shown, re.MULTILINE)) == make_targets()


def test_every_dependency_is_pinned_and_installed_as_pinned() -> None:
    wanted = [
        *PROJECT["dependencies"],
        *(r for extra in PROJECT["optional-dependencies"].values() for r in extra),
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement.name
    elsewhere = {"pip", *(r.name for r in map(Requirement, wanted) if r.marker and not r.marker.evaluate())}
    expected = {name: version for name, version in pins().items() if name not in elsewhere}
    assert {name: importlib.metadata.version(name).split("+")[0] for name in expected} == expected


def test_the_base_installation_brings_no_torch() -> None:
    todo, seen = list(PROJECT["dependencies"]), set()
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if (name, *sorted(extras)) in seen:
            continue
        seen.add((name, *sorted(extras)))
        for text in importlib.metadata.requires(name) or []:
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(text)
    assert not {"torch", "transformers", "onnxruntime"} & {name for name, *_ in seen}


def test_images_are_unprivileged_and_the_api_holds_no_worker() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = {
        match["name"]: match["body"]
        for match in re.finditer(
            r"^FROM (?P<base>\S+) AS (?P<name>\S+)\n(?P<body>.*?)(?=^FROM |\Z)",
            text,
            re.MULTILINE | re.DOTALL,
        )
    }
    assert {"api", "worker", "worker-gpu"} <= stages.keys()
    assert "USER 10001" in stages["base"]
    assert "HEALTHCHECK" in stages["api"]
    assert "HEALTHCHECK" in stages["worker"]
    assert "torch" not in stages["build-api"]
    assert "worker]'" not in stages["build-api"]
    for name in ("base", "api", "worker", "worker-gpu"):
        assert not re.search(r"apt-get|pip install|USER root", stages[name]), name


def test_compose_starts_things_in_order_and_shares_the_data() -> None:
    services = compose()["services"]
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in ("api", "sweeper", "worker-cpu", "worker-gpu"):
        service = services[name]
        assert service["build"]["target"] in targets
        assert service["volumes"] == ["data:/var/lib/modelpress"]
        assert service["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert service["depends_on"]["postgres"] == {"condition": "service_healthy"}
        assert service["cap_drop"] == ["ALL"]
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    assert {"database", "data"} == compose()["volumes"].keys()


def test_compose_and_its_example_of_an_environment_agree() -> None:
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert named == set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    variables = {name.upper() for name in Settings.model_fields}
    for name in compose()["x-environment"]:
        assert name.removeprefix("MODELPRESS_") in variables or name.startswith(("AWS_", "OTEL_"))
