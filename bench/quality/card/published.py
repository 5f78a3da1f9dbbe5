"""The datasets of the model card and article by name, each with its readers, its scoring and its published figure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ....kernels.errors import AfnextError
from ..data import Items
from . import covost2, librispeech, long_audio, medley_solos, mmau, mmau_pro, mmsu, scoring
from .rows import HUB, Hub, Recordings, Row, hub_rows
from .scoring import Scoring

FromRows = Callable[[Iterable[Row], Recordings], Items]


@dataclass(frozen=True)
class Dataset:
    """One dataset.

    published: the figure of the model card or article; scoring: prompt and scoring; local: reads a local copy, given
    its folder and one for recordings inside tables; hub, from_rows: its place on the Hub for the `datasets` package,
    and the reader of its rows; None for datasets whose recordings the Hub has only as archives, or not at all.
    """

    name: str
    published: str
    scoring: Scoring
    local: Callable[[Path, Path], Items]
    hub: Hub | None = None
    from_rows: FromRows | None = None

    def read(self, source: str | Path, unpacked: Path) -> Items:
        """The items of a local copy, or of "hub" or "hub:REPOSITORY" by the `datasets` package.

        unpacked: folder for recordings inside tables. Raises ManifestError for an incomplete copy, AfnextError for a
        dataset whose recordings the Hub does not have.
        """
        head, _, repository = str(source).partition(":")
        if head != HUB or Path(source).exists():
            return self.local(Path(source), unpacked)
        if self.hub is None or self.from_rows is None:
            raise AfnextError(f"{self.name} is read from a local copy only; name its folder")
        hub = replace(self.hub, repository=repository or self.hub.repository)
        return self.from_rows(hub_rows(hub), Recordings(unpacked, unpacked))


def _covost2(source: str, target: str) -> Dataset:
    names = covost2.LANGUAGES
    return Dataset(
        f"covost2-{source}-{target}",
        "21.9 BLEU" if (source, target) == ("en", "ar") else "",
        scoring.translations(names[source], names[target], target),
        covost2.local(source, target),
        Hub("fixie-ai/covost2", f"{source}_{target}", "test"),
        covost2.from_rows,
    )


def _librispeech(kind: str, published: str) -> Dataset:
    return Dataset(
        f"librispeech-{kind}",
        published,
        scoring.transcripts(),
        librispeech.local(f"test-{kind}"),
        Hub("openslr/librispeech_asr", kind, "test"),
        librispeech.from_rows,
    )


DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        _librispeech("clean", "1.54 WER"),
        _librispeech("other", "2.76 WER"),
        Dataset("mmau", "74.20 / 75.01 / 75.76", scoring.choices(), mmau.local("mmau-test-mini.json")),
        Dataset("mmau-pro", "", scoring.mixed(), mmau_pro.local),
        Dataset("mmar", "", scoring.choices(), mmau.local("MMAR-meta.json")),
        Dataset("mmsu", "", scoring.letters(), mmsu.local, Hub("ddwang2000/MMSU", None, "train"), mmsu.from_rows),
        Dataset("long-audio-bench", "", scoring.judged(), long_audio.local),
        Dataset("medley-solos", "", scoring.choices(), medley_solos.local),
        *(_covost2(*pair) for pair in covost2.PAIRS),
    )
}
NAMES = (*(name for name in DATASETS if not name.startswith("covost2-")), "covost2-SOURCE-TARGET")
"""The names for people: one stands for all pairs of CoVoST 2, such as covost2-en-de."""
