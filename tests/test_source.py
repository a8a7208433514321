"""The source never runs code out of data files."""

import ast
import pickle
from pathlib import Path

from hostile import Intruder

ROOT = Path(__file__).parent.parent


# Calls that run code out of files, or unpack them where they please.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load",
    "yaml.unsafe_load_all", "joblib.load", "pd.read_pickle", "pandas.read_pickle",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip
UNPACKING = ("archive.extract", "file.extract", "extractall")
MODULES = {"cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve"}
NEEDED = {
    "torch.load": "weights_only=True",
    "np.load": "allow_pickle=False",
    "numpy.load": "allow_pickle=False",
}
SWITCHES = {"weights_only=False", "allow_pickle=True", "shell=True", "trust_remote_code=True"}


def is_unsafe(node):
    """Whether a node of Python source could run code out of a file."""
    text = ast.unparse(node)
    if isinstance(node, ast.Import):
        return any(alias.name in MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        loading = any("load" in alias.name for alias in node.names)
        return node.module in {"pickle", *MODULES} or (
            node.module in ("torch", "numpy", "yaml", "joblib") and loading
        )
    if isinstance(node, ast.Attribute):
        return text.startswith("pickle.") and node.attr != "UnpicklingError"
    if isinstance(node, ast.keyword):
        return text in SWITCHES
    if isinstance(node, ast.Call):
        name, given = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
        missing = name in NEEDED and NEEDED[name] not in given
        return name in FORBIDDEN or name.endswith(UNPACKING) or missing
    return False


def unsafe(source):
    """What in Python source could run code out of a file."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if is_unsafe(node)]


UNSAFE = [
    "torch.load(path)", "torch.load(path, map_location='cpu')", "from torch import load",
    "torch.load(p, weights_only=False)", "torch.load(p, weights_only=safe)", "np.load(path)",
    "np.load(p, allow_pickle=True)", "numpy.load(path)", "from numpy import load",
    "yaml.load(text, Loader=Loader)", "from yaml import unsafe_load", "pickle.loads(data)",
    "pickle.Unpickler(file).load()", "from pickle import loads", "load = pickle.load",
    "import dill", "import shelve", "joblib.load(p)", "pd.read_pickle(p)", "eval(text)",
    "torch.hub.load(a, b)", "exec(text)", "os.system(text)", "f(text, shell=True)",
    "archive.extractall()", "archive.extract(m)", "f(allow_pickle=True)",
]  # fmt: skip
SAFE = [
    "torch.load(p, weights_only=True)", "np.load(f, allow_pickle=False)", "json.load(f)",
    "try: f()\nexcept pickle.UnpicklingError: pass", "import pickle", "yaml.safe_load(t)",
    "model.eval()", "extractor.extract(x)", "re.compile(x)", "from json import load",
]  # fmt: skip


def test_the_check_of_the_source_finds_what_is_unsafe_only():
    assert [source for source in UNSAFE if not unsafe(source)] == []
    assert [source for source in SAFE if unsafe(source)] == []


def test_nothing_in_the_source_runs_code_out_of_files():
    files = list(ROOT.glob("*.py"))
    for folder in ("lab", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    assert len(files) > 80
    # Plugins are code that the user names.
    files.remove(ROOT / "lab" / "config" / "plugins.py")
    found = {path.name: unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert not any(found.values()), found


def test_the_intruder_would_run(tmp_path):
    pickle.loads(pickle.dumps(Intruder(tmp_path / "intruded")))
    assert (tmp_path / "intruded").is_dir()
