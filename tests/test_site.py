"""The site is built without a warning, needs no network, and its made pages miss nothing."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import playground.settings
import service.settings
import service.webhooks.settings
import worker.settings
from safelatent.errors import ERRORS
from service.advice import ADVICE
from service.openapi import FILE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

from building import problems, settings  # noqa: E402

LOADED = re.compile(r"""<(?:script|img|link|source|iframe)\b[^>]*?(?:src|href)=["']([^"']+)""")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "models/emoji_scenes/README.md",
]
PAGES += [f"docs/{path.name}" for path in sorted(DOCS.glob("*.md"))]
BRANCHES = {"safelatent-error", *problems.BRANCHES}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield folder


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        for url in LOADED.findall(page.read_text()):
            assert not url.startswith(("http:", "https:", "//")), f"{page.name} loads {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text()), style


def test_equations_are_mathml(site: Path) -> None:
    page = (site / "how-it-works.html").read_text()
    assert page.count('display="block"') == 5
    assert "$$" not in page


def test_every_problem_has_its_page_at_the_place_that_its_type_names(site: Path) -> None:
    for slug, cls in ERRORS.items():
        page = (site / "problems" / f"{slug}.html").read_text()
        assert f"/problems/{slug}" in page
        assert cls.title.split("'")[0] in page


def test_every_operation_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "rest.html").read_text()
    for path, operations in json.loads(FILE.read_text())["paths"].items():
        for method in operations:
            assert f"{method.upper()} {path}" in page


def test_every_type_of_problem_has_a_cause_and_a_cure() -> None:
    assert ADVICE.keys() == ERRORS.keys() - BRANCHES


def test_the_tables_of_troubleshooting_are_what_the_service_says() -> None:
    rows = re.findall(r"^\| `.*$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert rows == [f"| `{slug}` | {each.cause} | {each.cure} |" for slug, each in ADVICE.items()]


@pytest.mark.parametrize(
    "module", [service.settings, service.webhooks.settings, worker.settings, playground.settings]
)
def test_every_setting_is_shown_and_explained(module: object) -> None:
    cls = module.Settings  # type: ignore[attr-defined]
    shown = list(settings.settings(ROOT / f"{cls.__module__.replace('.', '/')}.py"))
    own = [name for name in cls.model_fields if name in cls.__dict__["__annotations__"]]
    variables = [
        cls.model_fields[name].validation_alias or f"{cls.model_config['env_prefix']}{name}".upper()
        for name in own
    ]
    assert [each.name for each in shown] == variables
    assert [each.name for each in shown if not each.meaning] == []


def test_the_architecture_names_files_that_exist_in_columns_that_fit() -> None:
    page = (DOCS / "architecture.md").read_text()
    drawing = page.split("```text\n")[1].split("```")[0]
    assert max(map(len, drawing.splitlines())) <= 90
    named = re.findall(r"`((?:safelatent|service|worker)/[\w/.]+)`", page)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_that_are_read_in_the_repository_link_to_what_is_there(page: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    local = [(ROOT / page).parent / target for target in targets if "://" not in target]
    made = [DOCS / "reference", DOCS / "problems"]  # by `make docs`, in the site alone
    lost = [path for path in local if not path.exists() or path.parent.resolve() in made]
    assert lost == []
