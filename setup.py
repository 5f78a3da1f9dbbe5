"""Maps the folders of the repository to the package: each floor is a sub-package of `afnext`."""

from setuptools import setup

FLOORS = {
    "afnext": "afnext",
    "afnext.kernels": "kernels",
    "afnext.quant": "quant",
    "afnext.runtime": "runtime",
    "afnext.bench": "bench",
}

setup(
    package_dir=FLOORS,
    packages=[
        *FLOORS,
        "afnext.runtime.io",
        "afnext.runtime.model",
        "afnext.runtime.engine",
        "afnext.runtime.app",
        "afnext.bench.tiny",
    ],
    package_data={"afnext": ["py.typed"], "afnext.bench": ["data/*"]},
)
