"""Clocks, power and heat of a card, read with nvidia-ml-py where it is installed."""

from __future__ import annotations

from typing import Any

import torch

# Bits of NVML's reasons for a clock that mean slower than asked for: power cap, heat, hardware
# slowdown (nvml.h, nvmlClocksEventReasons); idle and application clocks are none.
SLOWED = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class CardState:
    """The state of the first card; nothing is known of it without nvidia-ml-py.

    Attributes:
        slowed: whether `watch` has seen it slowed by heat or power.
    """

    def __init__(self) -> None:
        self.slowed = False
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
        power, reasons = self._ask("nvmlDeviceGetPowerUsage"), self._reasons()
        return {
            "clock_mhz": self.clock_mhz(),
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

    def watch(self) -> None:
        """Note whether the card is slowed now; to be called while it works."""
        if self._nvml is not None and (self._reasons() or 0) & SLOWED:
            self.slowed = True

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
