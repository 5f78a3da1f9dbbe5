"""Merges the metrics of all replicas."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


@dataclass
class _Families(Collector):
    families: dict[str, Metric] = field(default_factory=dict)

    def collect(self) -> Iterator[Metric]:
        """The metrics by name."""
        yield from self.families.values()


def merged(texts: Mapping[str, str]) -> bytes:
    """The metrics of each replica, in Prometheus' text format, with the label `replica`."""
    all_of_them = _Families()
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            metric = all_of_them.families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            metric.samples += [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
            ]
    return generate_latest(all_of_them)
