"""Maps the folders of the repository to the package, and compiles the native kernels where there is a compiler.

Each floor is a sub-package of `afnext`. `python setup.py build_ext --inplace` compiles the native kernels beside their
sources, as an editable install does. Without a compiler everything else installs and the CPU runs on torch.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("kernels", "native")
FLOORS = {
    "afnext": "afnext",
    "afnext.kernels": "kernels",
    "afnext.quant": "quant",
    "afnext.runtime": "runtime",
    "afnext.bench": "bench",
    "afnext.serve": "serve",
}


def packages() -> list[str]:
    """Every folder of Python files below a floor. `training` and `tests` are no floors and stay out of the wheel."""
    folders = (path.parent for floor in FLOORS.values() for path in Path(floor).rglob("__init__.py"))
    names = {".".join(folder.parts) for folder in folders}
    return ["afnext", *sorted(f"afnext.{name}" for name in names - {"afnext"})]


_spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


class BuildNative(build_ext):
    """Compiles the libraries of the native kernels, which no Python includes; one that fails is said and left out."""

    def run(self):
        folder = NATIVE if self.inplace else Path(self.build_lib, "afnext", NATIVE)
        for library in self.get_outputs():  # of an earlier build, which this one may not replace
            Path(library).unlink(missing_ok=True)
        try:
            native_build.build(folder, Path("build", "native"))
        except native_build.BuildError as error:
            print(
                "warning: the native CPU kernels are not built, operations will run on torch instead, int4 weights "
                f"about 25 times slower: {error}",
                file=sys.stderr,
            )

    def get_outputs(self):
        if self.inplace:
            return []
        folder = Path(self.build_lib, "afnext", NATIVE)
        return [str(folder / native_build.library_name(level)) for level in native_build.levels()]

    def get_output_mapping(self):
        return {}


class NativeWheel(bdist_wheel):
    """The libraries are called through ctypes: a wheel belongs to a platform, not to a version of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    package_dir=FLOORS,
    packages=packages(),
    include_package_data=False,  # MANIFEST.in is for the source distribution alone
    package_data={
        "afnext": ["py.typed"],
        "afnext.bench": ["data/*"],
        "afnext.runtime.model": ["afnext_tiny/*"],
        "afnext.serve": ["static/*"],
    },
    exclude_package_data={"afnext.kernels.native": ["*.cpp", "*.h"]},
    # Named so that sources and headers are in the source distribution and wheels are per platform.
    ext_modules=[
        Extension(
            "afnext.kernels.native.libafnext",
            sources=sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
