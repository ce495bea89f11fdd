"""Clocks, power and heat of a card, read with nvidia-ml-py where it is installed."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

# Bits of NVML's reasons for a clock that mean slower than asked for: power cap, heat, hardware
# slowdown (nvml.h, nvmlClocksEventReasons); idle and application clocks are none.
SLOWED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class CardState:
    """The state of the first card; nothing is known of it without nvidia-ml-py."""

    def __init__(self) -> None:
        # What `watch` has read, by the name of what ran.
        self._seen: dict[str, list[dict[str, Any]]] = {}
        self._nvml: Any = None
        self._handle: Any = None
        if not torch.cuda.is_available():
            return
        try:
            import pynvml
        except ImportError:
            return
        # CUDA counts the cards of CUDA_VISIBLE_DEVICES alone, fastest first: asked for by address.
        card = torch.cuda.get_device_properties(0)
        address = f"{card.pci_domain_id:08x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(address)
            self._nvml = pynvml
        except pynvml.NVMLError:
            pass

    def describe(self) -> dict[str, Any]:
        """driver, power limit (W) and what `read` gives."""
        if self._nvml is None:
            return {}
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        return {
            "driver": self._nvml.nvmlSystemGetDriverVersion(),
            "power_limit_w": limit and limit / 1e3,
            **self.read(),
        }

    def read(self) -> dict[str, Any]:
        """clock and memory clock (MHz), power (W), temperature (°C), slowed: as of now."""
        if self._nvml is None:
            return {}
        nvml = self._nvml
        # What changes fastest comes first.
        clock, reasons = self.clock_mhz(), self._reasons()
        power = self._ask("nvmlDeviceGetPowerUsage")
        return {
            "clock_mhz": clock,
            "memory_mhz": self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "power_w": power and power / 1e3,
            "temperature_c": self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "slowed": None if reasons is None else bool(reasons & SLOWED),
        }

    def clock_mhz(self) -> float | None:
        """The clock of the multiprocessors now; None where it is not known."""
        if self._nvml is None:
            return None
        return self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)

    def watch(self, name: str) -> None:
        """Note the state of now; to be called while the card works at what has that name."""
        if found := self.read():
            self._seen.setdefault(name, []).append(found)

    def seen(self, name: str) -> dict[str, float]:
        """Medians of clock (clock_mhz) and power (power_w) while it ran, as far as known."""
        readings = self._seen.get(name, [])
        known = {
            key: [float(one[key]) for one in readings if one[key] is not None]
            for key in ("clock_mhz", "power_w")
        }
        return {key: median(values) for key, values in known.items() if values}

    def note(self, name: str) -> str:
        """That the card was slowed by heat or power while it ran, or ""."""
        slowed = any(one["slowed"] for one in self._seen.get(name, []))
        return "the card was slowed by heat or power" if slowed else ""

    def _reasons(self) -> int | None:
        # The second is the name of older drivers, and leaves with CUDA 14.
        now = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        return self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") if now is None else now

    def _ask(self, question: str, *words: Any) -> Any:
        """The answer of NVML; None where package, driver or card do not know the question."""
        try:
            return getattr(self._nvml, question)(self._handle, *words)
        except (AttributeError, self._nvml.NVMLError):
            return None
