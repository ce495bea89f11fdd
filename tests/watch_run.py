"""A synthetic run: the files that a trainer leaves in its output folder, written piece by piece.

    python tests/watch_run.py OUT [SECONDS_PER_STEP]

writes one live, to look at with `anima-fast watch OUT`.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

PROMPTS = (
    "a photograph of an astronaut in an orange suit, flag, smile",
    "mika, 1girl, silver hair, reading under a lamp, rain outside the window, warm light, soft "
    "focus, detailed background, looking at viewer",
    "a red fox in fresh snow, morning",
    "the harbour at night, lanterns, long exposure",
)


class FakeRun:
    """Writes the files of a run into a folder.

    Args:
        out: the folder; made when it is missing.
        steps, per_epoch: of the run.
        sizes: width and height of the preview of each prompt.
    """

    def __init__(self, out, steps=400, per_epoch=40, sizes=((96, 96), (64, 96), (96, 64))):
        self.out, self.steps, self.per_epoch, self.sizes = Path(out), steps, per_epoch, sizes
        self.out.mkdir(parents=True, exist_ok=True)
        self.random = random.Random(0)
        self.step, self.average = 0, None
        self.facts = {
            "version": "0.1.0", "output_name": "mika_style_v3", "method": "LoRA rank 16",
            "pid": 4242, "started_at": time.time(), "updated_at": time.time(), "state": "running",
            "first_step": 0, "steps": steps, "epochs": math.ceil(steps / per_epoch),
            "batches_per_epoch": per_epoch, "images": 48, "device": "cuda",
            "base_model": "anima-base-v1.0.safetensors", "final": None, "error": None,
        }  # fmt: skip

    @property
    def epoch(self):
        """The epoch of the current step, counted from 1."""
        return max(1, math.ceil(self.step / self.per_epoch))

    def run_file(self, **changes):
        """Write run.json."""
        self.facts |= {"updated_at": time.time(), **changes}
        (self.out / "run.json").write_text(json.dumps(self.facts), encoding="utf-8")

    def log(self, *records):
        """Append records to log.jsonl."""
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def say(self, text):
        """Append a line to console.log."""
        with open(self.out / "console.log", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def record(self):
        """Make the next step and return its record."""
        self.step += 1
        trend = 0.062 + 0.05 * math.exp(-3 * self.step / self.steps)
        loss = trend * self.random.lognormvariate(0, 0.45)
        self.average = loss if self.average is None else 0.97 * self.average + 0.03 * loss
        warm = min(1.0, self.step / (0.08 * self.steps))
        rate = warm * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        step_s = 14.2 if self.step == 1 else 1.62 + abs(self.random.gauss(0, 0.05))
        return {
            "kind": "step", "step": self.step, "epoch": self.epoch, "loss": loss,
            "loss_avg": self.average, "lr": {"unet": 2e-4 * rate, "text_encoder": 5e-5 * rate},
            "d_lr": {}, "grad_norm": self.random.lognormvariate(-1.6, 0.3), "step_s": step_s,
            "images_per_s": 4 / step_s, "memory_mib": 11_240 + min(400, self.step),
        }  # fmt: skip

    def advance(self, count=1):
        """Make steps, with what comes at the end of an epoch."""
        for _ in range(count):
            self.log(self.record())
            if self.step % self.per_epoch == 0:
                self.end_epoch()

    def end_epoch(self):
        """Validation, the loss by sigma and the line of the epoch."""
        loss = 0.07 + 0.04 * math.exp(-3 * self.step / self.steps)
        at = {"step": self.step, "epoch": self.epoch}
        per_sigma = {str(s): loss * (1.7 - 1.4 * s) for s in (0.2, 0.4, 0.6, 0.8)}
        means = [loss * (1.9 - 1.5 * (i + 0.5) / 10) for i in range(10)]
        self.log(
            {"kind": "validation", **at, "loss": loss, "divergence": loss - self.average,
             "per_sigma": per_sigma},
            {"kind": "epoch", **at, "loss_avg": self.average},
            {"kind": "sigma_bins", **at, "means": means, "counts": [40 - 2 * i for i in range(10)]},
        )  # fmt: skip
        self.say(f"epoch {self.epoch}: loss {self.average:.4f}, validation loss {loss:.4f}")

    def preview(self, label=None):
        """Render a picture for each prompt and log them."""
        label = label or f"e{self.epoch:06d}"
        folder, files = self.out / "sample", []
        folder.mkdir(exist_ok=True)
        stamp = time.strftime("%Y%m%d%H%M%S")
        for index, size in enumerate(self.sizes):
            name = f"{self.facts['output_name']}_{label}_{index:02d}_{stamp}_{41 + index}.png"
            info = PngImagePlugin.PngInfo()
            prompt = PROMPTS[index % len(PROMPTS)]
            info.add_text("parameters", f"{prompt}\nNegative prompt: blurry\nSteps: 20, Seed: 1")
            picture(size, index, self.step / self.steps).save(folder / name, pnginfo=info)
            files.append(f"sample/{name}")
        self.log({"kind": "preview", "step": self.step, "epoch": self.epoch, "files": files})

    def dataset(self):
        """Write dataset.json."""
        sizes = [(1024, 1024, 18), (832, 1216, 14), (1216, 832, 9), (896, 1152, 5), (768, 1344, 2)]
        tags = ["mika", "1girl", "silver hair", "smile", "looking at viewer", "outdoors", "rain"]
        value = {
            "images": 48, "uses": 96, "validation": 4, "batches_per_epoch": self.per_epoch,
            "subsets": [{"folder": "/data/mika/portraits", "images": 36, "repeats": 2},
                        {"folder": "/data/mika/full body", "images": 12, "repeats": 2}],
            "buckets": [{"width": w, "height": h, "images": n, "repeats": 2 * n}
                        for w, h, n in sizes],
            "captions": {"count": 46, "missing": ["/data/mika/portraits/017.png"],
                         "missing_total": 1, "empty": [], "empty_total": 0,
                         "long": [{"file": "/data/mika/portraits/031.txt", "tokens": 588}],
                         "long_total": 1},
            "problems": [{"kind": "upscaled", "file": "/data/mika/portraits/004.png",
                          "text": "640 × 512 is enlarged to 1152 × 896"}],
            "problems_total": 1,
            "tags": [[tag, 46 - 6 * i] for i, tag in enumerate(tags)], "tags_total": 182,
        }  # fmt: skip
        (self.out / "dataset.json").write_text(json.dumps(value), encoding="utf-8")

    def whole(self, steps=None):
        """Everything a run writes until a step, previews at every second epoch."""
        self.dataset()
        for text in ("48 images in 5 buckets", "cached latents of 48 images in 0:31",
                     "WARNING 1 caption is longer than 512 tokens: portraits/031.txt",
                     "LoRA of rank 16 on 280 layers, 22.9 M parameters"):  # fmt: skip
            self.say(text)
        self.run_file()
        self.preview("e000000")
        for _ in range(min(steps or self.steps, self.steps)):
            self.advance()
            if self.step % (2 * self.per_epoch) == 0:
                self.preview()
            if self.step == self.per_epoch * 3 + 7:
                text = "out of memory: this batch again with --recompute block"
                self.log({"kind": "event", "step": self.step, "text": text})
                self.say(f"step {self.step}: {text}")
        return self


def picture(size, index, share):
    """A small landscape that gets clearer over the run."""
    width, height = size
    shades = Image.linear_gradient("L").resize(size)
    hues = ((250, 170, 90), (90, 120, 220), (210, 90, 70), (30, 60, 110))
    image = Image.composite(
        Image.new("RGB", size, hues[index % 4]), Image.new("RGB", size, (24, 28, 44)), shades
    )
    draw = ImageDraw.Draw(image)
    r = min(size) * (0.12 + 0.16 * share)
    x, y = width * (0.3 + 0.1 * index), height * 0.42
    draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 240, 205))
    line = [(0, height * 0.75), (width * 0.4, height * (0.75 - 0.3 * share)), (width, height * 0.8)]
    draw.polygon([*line, (width, height), (0, height)], fill=(18, 22, 34))
    return image


def main():
    """Write a run live, a step at a time."""
    out, seconds = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.2
    run = FakeRun(out, steps=2000, per_epoch=100, sizes=((512, 512), (416, 608), (608, 416)))
    for name in ("log.jsonl", "console.log"):
        (run.out / name).unlink(missing_ok=True)
    run.dataset()
    run.say("reading models")
    time.sleep(3)
    run.run_file()
    while run.step < run.steps:
        run.advance()
        if run.step % 100 == 0:
            run.preview()
        time.sleep(seconds)
    run.run_file(state="finished", final="mika_style_v3.safetensors")


if __name__ == "__main__":
    main()
