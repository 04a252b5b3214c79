"""Metrics for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from fastllm.serving.scheduler import Scheduler


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "fastllm_requests", "Responses to /v1/completions.", ["status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "fastllm_prompt_tokens", "Tokens of accepted prompts.", registry=registry
        )
        self.generated_tokens = Counter(
            "fastllm_generated_tokens", "Tokens generated.", registry=registry
        )
        self.disconnects = Counter(
            "fastllm_disconnects",
            "Clients that disconnected before the end of the response.",
            registry=registry,
        )
        buckets = [0.001 * 2**i for i in range(16)]
        self.first_token = Histogram(
            "fastllm_time_to_first_token_seconds",
            "Time from a sequence's arrival to its first token.",
            buckets=buckets,
            registry=registry,
        )
        self.duration = Histogram(
            "fastllm_request_seconds", "Duration of requests.", buckets=buckets, registry=registry
        )

    def watch(self, scheduler: Scheduler) -> None:
        """Adds gauges of the scheduler's slots and queue."""
        for name, text, read in (
            ("fastllm_active", "Sequences being computed.", lambda: scheduler.running),
            ("fastllm_queued", "Sequences waiting for a slot.", lambda: scheduler.queued),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)
