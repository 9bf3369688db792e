"""Storage holds data: nothing in the source loads a pickle or runs what a file says, but where it is said why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ALLOWED = {
    # Original DiT checkpoints are .pt: torch's weights-only loader, which refuses all but tensors and plain values.
    ("ldm/exchange/original.py", "torch.load"),
    # `ldm evaluate features=PATH`, a program that the user gives (SECURITY.md).
    ("ldm/features.py", "torch.jit.load"),
    ("ldm/features.py", "torch.export.load"),
    # `denoiser.type=PACKAGE:CLASS`, which the user names, and no file (SECURITY.md).
    ("ldm/denoiser.py", "importlib.import_module"),
    # The stages' own entry points, `jobs.VERB` of a fixed list.
    ("jobs/cli.py", "importlib.import_module"),
    ("jobs/cluster_checks.py", "importlib.import_module"),
}
FORBIDDEN = {
    *(
        f"{module}.{name}"
        for module in ("pickle", "cPickle", "dill", "cloudpickle", "marshal")
        for name in ("load", "loads")
    ),
    *("pickle.Unpickler", "shelve.open", "joblib.load", "numpy.load", "np.load", "pandas.read_pickle"),
    *("torch.load", "torch.jit.load", "torch.export.load", "torch.hub.load", "torch.package.PackageImporter"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "__import__", "importlib.import_module"),
    *("os.system", "os.popen"),
}


def dangers(source: str) -> set[str]:
    """The calls in `source` that may run what they read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_plain = name in ("np.load", "numpy.load") and given.get("allow_pickle") == "False"
        if name in FORBIDDEN and not is_plain:
            found.add(name)
        unsafe = {("allow_pickle", "True"), ("weights_only", "False"), ("shell", "True"), ("trust_remote_code", "True")}
        found |= {f"{name}({key}={value})" for key, value in given.items() if (key, value) in unsafe}
    return found


def test_only_the_named_places_load_what_could_run() -> None:
    files = [path for layer in ("ldm", "pipelines", "jobs") for path in sorted((ROOT / layer).rglob("*.py"))]
    assert len(files) > 100
    found = {(str(path.relative_to(ROOT)), name) for path in files for name in dangers(path.read_text())}
    assert found == ALLOWED


def test_the_one_pickle_reader_is_the_weights_only_one() -> None:
    tree = ast.parse((ROOT / "ldm/exchange/original.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert [{k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] for call in calls] == ["True"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(x)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "torch.load(f, weights_only=False)",
        "subprocess.run(x, shell=True)",
        "def f():\n    return eval(x)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_a_planted_one_is_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source", ["np.load(f, allow_pickle=False)", "model.eval()", "yaml.safe_load(x)", "json.load(f)"]
)
def test_a_harmless_one_is_not(source: str) -> None:
    assert dangers(source) == set()
