"""Looking at a dataset before it is trained: the plan, the captions and the pixels.

The plan is that of `data/plan.py`, which training uses too. No model is loaded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anima_fast.data.cache_folders import printable
from anima_fast.data.caption_tokens import CaptionTokens, count_tokens, renderings
from anima_fast.data.findings import plan_problems
from anima_fast.data.folders import folder_problems, mask_problems
from anima_fast.data.health import count_tags, spelling_variants
from anima_fast.data.items import DatasetPlan, ImageItem, Length, run_length
from anima_fast.data.plan import build_plan
from anima_fast.data.problems import Problem
from anima_fast.models.tokenizer_files import QWEN3, T5, TokenizerMissing, explicit_files
from anima_fast.models.tokenizers import Tokenizers, load_tokenizers
from anima_fast.reports.dataset.duplicates import find_duplicates
from anima_fast.reports.dataset.pixels import Look, OnProgress, look_at

if TYPE_CHECKING:
    from anima_fast.options.data import ModelFiles
    from anima_fast.options.run import TrainOptions


@dataclass
class Survey:
    """A dataset as it will be trained, and what is wrong with it.

    items: training images, then those held out, then unused regularisation images. texts: the
    rendering of each item's caption that has the most tokens, in the order of `items`. looks: what
    the pixels say, by file; empty when only headers were read. duplicates: groups of files with the
    same pixels (`exact`), or that look nearly the same (`near`). token_note: why there are no
    counts. lost_text: what is cut off a long caption, by file. masks: one entry for each that was
    drawn.
    """

    title: str
    plan: DatasetPlan
    length: Length
    items: list[ImageItem]
    texts: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    looks: dict[Path, Look] = field(default_factory=dict)
    duplicates: dict[str, list[list[Path]]] = field(
        default_factory=lambda: {"exact": [], "near": []}
    )
    tags: Counter[str] = field(default_factory=Counter)
    spellings: list[list[tuple[str, int]]] = field(default_factory=list)
    tokens: CaptionTokens | None = None
    token_note: str = ""
    lost_text: dict[str, str] = field(default_factory=dict)
    masks: list[dict[str, Any]] = field(default_factory=list)

    def thumbnails(self) -> dict[str, bytes]:
        """The thumbnail of each image that could be read, by its name in the record."""
        pictures = {path: look.thumbnail for path, look in self.looks.items()}
        return {printable(str(path)): data for path, data in pictures.items() if data is not None}


def survey_dataset(
    options: TrainOptions, *, decode: bool, thumbnails: bool, masked: bool, on_progress: OnProgress
) -> Survey:
    """Look at everything that the options would train; no model file is opened but the tokenizers.

    decode: look at the pixels too: damage, duplicates, transparency. thumbnails: keep a small
    picture of each image. masked: read mask folders even if `masked_loss` is off. Raises
    `UserError` for a broken configuration, and for a folder that is missing or holds no image;
    single files that are wrong become problems instead.
    """
    problems: list[Problem] = []
    unmasked = masked and not options.masked_loss
    plan = build_plan(replace(options, masked_loss=True) if unmasked else options, problems)
    if unmasked and any(s.conditioning_data_dir for d in plan.datasets for s in d.subsets):
        plan.notices.append("masks of conditioning_data_dir count only with --masked_loss")
    items = [*plan.items, *plan.validation_items, *plan.unused]
    data = options.dataset_config or options.train_data_dir or options.in_json or ""
    length = run_length(options, max(plan.batches_per_epoch, 1))
    survey = Survey(Path(data).name, plan, length, items)
    _count_tokens(survey, options)
    problems += plan_problems(plan, survey.tokens)
    problems += folder_problems(plan.datasets) + mask_problems(items)
    if decode:
        problems += _look_at_pixels(survey, thumbnails, on_progress)
    survey.tags = count_tags(item for item in items if not item.is_reg)
    survey.spellings = spelling_variants(survey.tags)
    for group in survey.spellings:
        text = ", ".join(f"{tag} ({count}x)" for tag, count in group)
        problems.append(Problem("tag spelling", "", text))
    survey.problems = list(dict.fromkeys(problems))
    return survey


def _count_tokens(survey: Survey, options: TrainOptions) -> None:
    texts = renderings(survey.items, options)
    survey.texts = [rendered[0] for rendered in texts]
    tokenizers, survey.token_note = _tokenizers(options)
    if tokenizers is None:
        return
    survey.tokens = tokens = count_tokens(survey.items, texts, tokenizers, options)
    survey.texts = [max(t, key=lambda text: tokens.lengths[text].longest) for t in texts]
    long = {str(caption.file) for caption in tokens.long}
    for item, text in zip(survey.items, survey.texts, strict=True):
        file = str(item.caption.file or item.path)
        if file in long and not tokens.whole:
            survey.lost_text[file] = text[tokenizers.kept_length(text, tokens.limits) :].strip()


def _tokenizers(files: ModelFiles) -> tuple[Tokenizers | None, str]:
    """The tokenizers if they are available, else a sentence that says how to get counts."""
    # A wrong path is an error even when the other tokenizer is missing.
    named = ((QWEN3, files.qwen3_tokenizer_path), (T5, files.t5_tokenizer_path))
    for source, path in named:
        if path:
            explicit_files(source, Path(path))
    if files.qwen3 and not Path(files.qwen3).exists():
        # The data can be checked before the model files are there.
        return None, f"not counted: --qwen3 {files.qwen3} does not exist"
    try:
        return load_tokenizers(
            files.qwen3,
            qwen3_tokenizer_path=files.qwen3_tokenizer_path,
            t5_tokenizer_path=files.t5_tokenizer_path,
            models_dir=files.models_dir,
            fetch=False,
        ), ""
    except TokenizerMissing as error:
        missing = str(error).partition(" found,")[0]
        return None, (
            f"not counted: {missing} at hand; give --qwen3 (or --qwen3_tokenizer_path) and "
            "--t5_tokenizer_path, or --models_dir, or run `anima-fast download --tokenizers_only`"
        )


def _look_at_pixels(survey: Survey, thumbnails: bool, on_progress: OnProgress) -> list[Problem]:
    sizes = {item.path: item.size for item in survey.items}
    captions = {item.path: item.caption for item in survey.items}
    survey.looks = look_at(
        sizes.keys(),
        thumbnails=thumbnails,
        turned={item.path for item in survey.items if item.is_turned},
        masked={item.path for item in survey.items if item.subset.alpha_mask},
        on_progress=on_progress,
    )
    found = [problem for look in survey.looks.values() for problem in look.problems]
    exact, near = find_duplicates(survey.looks, sizes)
    survey.duplicates = {"exact": exact, "near": near}
    for kind, groups in (("duplicate", exact), ("near duplicate", near)):
        for first, *others in groups:
            for path in others:
                same = captions[path] == captions[first]
                text = f"like {first.name}" + ("" if same else ", with another caption")
                found.append(Problem(kind, str(path), text))
    return found
