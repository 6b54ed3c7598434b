"""The rules of CONTRIBUTING.md that a program can check, by reading the sources (nothing but the stdlib, under 2 s)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "internvl_megatron"
ROOMS = ("internvl_megatron", "checkpoint_convert", "tools", "launch")

# Lowest first; a file imports from its own room or from lower layers. Modules named nowhere are on top: the command
# line and what it starts, which may import everything and which no room imports. `parallel.layout` and `scaling.counts` are
# pure arithmetic.
LAYERS = (
    {"errors", "typed_object"},
    {"parallel.layout", "config.schema"},
    {"scaling.counts"},
    {"config"},
    {"cpu_shim"},
    {"device"},
    {"ranks", "logs", "watching.boards"},
    {"watching.metrics", "watching.run_events", "object_store"},
    {"watching.progress"},
    {"parallel"},
    {"model", "data"},
    {"scaling"},
    {"train"},
    {"checkpoint"},
    {"inference"},
    {"evaluate"},
)

UNITS = (
    "tokens",
    "samples",
    "pixels",
    "rows",
    "tiles",
    "frames",
    "steps",
    "seconds",
    "bytes",
    "heads",
    "layers",
    "ranks",
    "replicas",
)
FACTORS = ("size", "share", "ratio", "rate", "scale", "factor", "std", "eps", "theta", "init", "decay", "numerator")
UNITLESS = {"seed", "beta", "beta1", "beta2", "clip_grad_norm", "keep_last", "language_rank", "vision_rank"}


def sources(*rooms: str) -> list[Path]:
    return sorted(p for room in rooms or ROOMS for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sources()}


def nodes[Node: ast.AST](*kinds: type[Node], rooms: tuple[str, ...] = ROOMS) -> Iterator[tuple[Path, Node]]:
    """All nodes of these kinds, with the file they are in."""
    for path, tree in TREES.items():
        if path.relative_to(ROOT).parts[0] in rooms:
            yield from ((path, node) for node in ast.walk(tree) if isinstance(node, kinds))


def place(path: Path, node: ast.stmt | ast.expr | ast.excepthandler) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full names of what an import statement may load: modules, and names that may be modules."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names]


def expect_none(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def test_no_global_statement() -> None:
    expect_none([place(*found) for found in nodes(ast.Global)])


def test_no_vague_file_names() -> None:
    expect_none([str(path) for path in TREES if path.stem in {"utils", "helpers", "common", "misc"}])


def names_device(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr in {"cuda", "nccl", "gloo"}
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    return re.fullmatch(r"[\w:,]*\b(cuda|nccl|gloo)\b[\w:,{}]*", text) is not None


def test_only_the_device_module_names_devices_and_backends() -> None:
    """A `Literal[...]` type may list them: it says what can be chosen."""
    allowed = {PACKAGE / "device.py", PACKAGE / "cpu_shim.py"}
    literals = (node for _, node in nodes(ast.Subscript) if ast.unparse(node.value) == "Literal")
    in_types = {id(part) for literal in literals for part in ast.walk(literal)}
    found = [
        place(path, node)
        for path, node in nodes(ast.Attribute, ast.Constant, rooms=("internvl_megatron", "checkpoint_convert"))
        if path not in allowed and id(node) not in in_types and names_device(node)
    ]
    expect_none(found)


def test_only_groups_touches_parallel_state() -> None:
    found = {path for path, node in nodes(ast.Import, ast.ImportFrom) if "parallel_state" in ".".join(imported(node))}
    assert found <= {PACKAGE / "parallel" / "groups.py"}


def is_broad(kind: ast.expr | None) -> bool:
    return kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"})


def test_no_error_is_caught_and_forgotten() -> None:
    idle = (ast.Pass, ast.Continue)
    found = [place(p, n) for p, n in nodes(ast.ExceptHandler) if is_broad(n.type) and isinstance(n.body[0], idle)]
    expect_none(found)


def test_every_assertion_has_a_message() -> None:
    expect_none([place(path, node) for path, node in nodes(ast.Assert) if node.msg is None])


def room_of(name: str) -> str | None:
    """Room of the package that a dotted name points into; None for other packages and for the package itself."""
    package, *parts = name.split(".")
    if package != PACKAGE.name or not parts:
        return None
    is_room = (PACKAGE / parts[0]).is_dir() or (PACKAGE / f"{parts[0]}.py").is_file()
    return parts[0] if is_room else None


def layer(name: str) -> int:
    """Layer of a module of the package, by its longest prefix among `LAYERS`."""
    module = name.removeprefix(f"{PACKAGE.name}.")
    levels = {known: level for level, rooms in enumerate(LAYERS) for known in rooms}
    fitting = [known for known in levels if f"{module}.".startswith(f"{known}.")]
    return levels[max(fitting, key=len)] if fitting else len(LAYERS)


def points_down(own: str, other: str) -> bool:
    """Whether module `own` of the package may import `other`."""
    if other.startswith((".", "tools", "launch", "tests")):
        return False
    on_top = layer(own) == len(LAYERS)
    return room_of(other) in {None, room_of(own)} or on_top or layer(other) < layer(own)


def test_imports_only_point_down() -> None:
    wrong = []
    for path, node in nodes(ast.Import, ast.ImportFrom, rooms=(PACKAGE.name,)):
        own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        wrong += [f"{place(path, node)} imports {other}" for other in imported(node) if not points_down(own, other)]
    expect_none(wrong)


def test_converters_are_used_where_foreign_weights_are_answered_with_alone() -> None:
    """They stand on the package; only inference, which reads Hugging Face folders as they are, stands on them."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path, node in nodes(ast.Import, ast.ImportFrom, rooms=(PACKAGE.name,))
        if any(name.split(".")[0] == "checkpoint_convert" for name in imported(node))
    }
    assert found == {"inference/run.py"}


def is_number(annotation: ast.expr) -> bool:
    return any(isinstance(part, ast.Name) and part.id in {"int", "float"} for part in ast.walk(annotation))


def has_unit(name: str) -> bool:
    words = name.split("_")
    counted = words[0] == "num" or words[-1] in UNITS or (len(words) > 2 and words[0] in UNITS and words[1] == "per")
    return counted or words[-1] in FACTORS or name in UNITLESS


def test_numbers_in_the_configuration_carry_their_unit() -> None:
    schema = TREES[PACKAGE / "config" / "schema.py"]
    fields = [node for node in ast.walk(schema) if isinstance(node, ast.AnnAssign) and is_number(node.annotation)]
    expect_none([name for field in fields if not has_unit(name := ast.unparse(field.target))])


def test_readme_map_equals_the_tree() -> None:
    """`__init__.py` files need no line of their own; every path that has one exists."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^#+ [^\n]*File map.*?^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block is not None, "README.md needs a fenced block after a heading 'File map', with lines 'path  - text'"
    listed = set(re.findall(r"^(\S+)\s+- ", block[1], re.MULTILINE))
    files = {p for room in ROOMS for end in ("py", "sh") for p in (ROOT / room).rglob(f"*.{end}")}
    names = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    assert sorted(names - listed) == [], "missing in the README's file map"
    assert sorted(name for name in listed if not (ROOT / name).exists()) == [], "in the README's file map only"


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, internvl_megatron, internvl_megatron.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_file_holds_a_path_of_this_machine() -> None:
    """A path of a machine = one below the folder this checkout lies in, that exists here."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(re.escape(f"{ROOT.parent}/".replace("//", "/")) + r"([\w.-]*\w)")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore") if (ROOT / name).is_file() else ""
        found += [f"{name}: {match[0]}" for match in pattern.finditer(text) if (ROOT.parent / match[1]).exists()]
    expect_none(found)
