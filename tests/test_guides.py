"""The README and the guides: short, linked, and of files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md"))
    if not {".venv", "BIG-Bench-Hard", "node_modules", ".pytest_cache"} & set(path.parts)
)


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    """What a Markdown file links to within the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    return [link for link in found if "://" not in link]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(guide: Path) -> None:
    broken = []
    for link in links(guide):
        name, _, anchor = link.partition("#")
        target = guide.parent / name if name else guide
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_fits_on_a_page_or_two_and_links_every_guide() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(readme)}
    own = {ROOT / "external" / "README.md", *(ROOT / "benchmarks").rglob("*.md")}
    assert set(GUIDES) - own - {readme} <= linked


@pytest.mark.parametrize("guide", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(guide: str) -> None:
    named = re.findall(
        r"`((?:ttt_harness/|tests/|benchmarks/|\w+/)?[\w/]+\.(?:py|md|yaml|cff)|(?:\w+/)+)`",
        (ROOT / guide).read_text("utf-8"),
    )
    missing = [name for name in named if not any((folder / name).exists() for folder in (ROOT, ROOT / "ttt_harness"))]
    assert missing == []


def test_the_readme_and_the_guide_to_training_list_every_family() -> None:
    from tests.checkpoints import CHECKPOINTS, FAMILY_TABLE
    from ttt_harness.training.shape import FAST, ModelShape

    text = (ROOT / "ttt_harness" / "training" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| `?(\w+)`? \| (fast|general) \|", text, re.MULTILINE)
    assert rows == [(family, architecture, way) for family, (architecture, way, _) in FAMILY_TABLE.items()]
    proven = {name for _, _, names in FAMILY_TABLE.values() for name in names}
    assert proven == CHECKPOINTS.keys()
    for architecture, way, names in FAMILY_TABLE.values():
        for name in names:
            shape = ModelShape.from_config(CHECKPOINTS[name], where=name)
            assert (shape.architecture, shape.way) == (architecture, way)
    assert {architecture for architecture, way, _ in FAMILY_TABLE.values() if way == "fast"} == FAST.keys()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for chosen in ("fast", "general"):
        families = [family for family, (_, way, _) in FAMILY_TABLE.items() if way == chosen]
        assert re.findall(rf"^\| {chosen} \| (.+) \|$", readme, re.MULTILINE) == ["; ".join(families)]
