"""One wheel, two import names, and a folder called kernels that must never become a module of that name."""

import ast
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernels" / "align_kernels"


def run_python(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    """What a fresh interpreter prints."""
    environment = {"PYTHONPATH": str(path)} if path is not None else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_no_package() -> None:
    """transformers looks for the Hugging Face package of that name; a namespace without a version is none to it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or "site-packages" in found.origin
    code = "from transformers.utils.import_utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code) == run_python(code, cwd=ROOT / "tests")


def test_no_folder_of_tests_can_be_imported_as_kernels() -> None:
    assert not (ROOT / "tests" / "kernels").exists()


def test_both_packages_import_from_anywhere(tmp_path: Path) -> None:
    code = "import align_kernels, lightning_align; print(align_kernels.__file__, lightning_align.__file__)"
    kernels, library = run_python(code, cwd=tmp_path).split()
    assert Path(kernels).parent == PACKAGE
    assert Path(library).parent == ROOT / "lightning_align"


def test_importing_the_kernels_imports_neither_triton_nor_the_library() -> None:
    code = (
        "import sys, align_kernels; print([m for m in ('triton', 'lightning', 'lightning_align') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_the_kernels_import_without_triton(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('there is no triton here')\n")
    code = "import align_kernels; print(align_kernels.available_impls('gae', 'cpu')[0])"
    assert run_python(code, path=tmp_path) == "native"


def test_only_kernel_modules_import_triton_at_the_top() -> None:
    for file in PACKAGE.glob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names])
        }
        assert ("triton" in imported) == (file.name.endswith("_kernel.py") or file.name == "_probe.py"), file.name


def test_no_module_hides_a_public_function() -> None:
    """``import align_kernels.x`` sets the attribute x of the package: it must not be a function's name."""
    import align_kernels

    assert not {path.stem for path in PACKAGE.iterdir()} & set(align_kernels.__all__)


def test_the_wheel_holds_both_packages(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"lightning_align", "align_kernels"}
    assert {"align_kernels/py.typed", "align_kernels/scan.c"} <= set(names)
    files = {path for path in (ROOT / "lightning_align").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {str(path.relative_to(ROOT)) for path in files} <= set(names)  # pages, styles and texts, too


def test_the_benchmark_refuses_to_run_as_a_script() -> None:
    """``python benchmarks/kernels.py`` would put a module named kernels first on the path."""
    done = subprocess.run([sys.executable, "benchmarks/kernels.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "python -m benchmarks.kernels" in done.stderr
