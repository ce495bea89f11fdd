"""LoRA files in diffusers' own loader: the same velocity and the same text rows as ours."""

import dataclasses

import pytest
import torch
from diffusers_dit import make_transformer
from safetensors.torch import load_file
from test_dit import diffusers_name
from test_llm_adapter import make_inputs as make_text_inputs
from tiny_dit import TINY, TINY_ADAPTER, adapter_weights, dit_weights, make_dit, make_inputs

from anima_fast.adapters import names
from anima_fast.adapters.lora import add_lora
from anima_fast.models.llm_adapter import load_llm_adapter

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")

CONFIG = dataclasses.replace(TINY, mlp_hidden=4 * TINY.model_channels)
# Both forms in which diffusers can read a file: without alpha, under its names or ComfyUI's.
FORMS = [{"dialect": "diffusers"}, {"dialect": "comfyui", "fold_alpha": True}]
IDS = ["diffusers", "folded comfyui"]


def make_conditioner(config=TINY_ADAPTER):
    return diffusers.AnimaTextConditioner(
        source_dim=config.source_width,
        target_dim=config.context_dim,
        model_dim=config.width,
        num_layers=config.layers,
        num_attention_heads=config.width // config.head_dim,
        mlp_ratio=config.hidden / config.width,
        target_vocab_size=config.vocabulary,
    ).eval()


class Pipeline(loaders.AnimaLoraLoaderMixin):
    """The two models that Anima's loader looks for, with our weights in them."""

    hf_device_map = None

    def __init__(self):
        self.transformer = make_transformer(CONFIG)
        weights = {diffusers_name(k): v for k, v in dit_weights(CONFIG).items()}
        self.transformer.load_state_dict(weights, strict=True)
        self.text_conditioner = make_conditioner()
        self.text_conditioner.load_state_dict(adapter_weights(), strict=True)

    @property
    def components(self):
        return {"transformer": self.transformer, "text_conditioner": self.text_conditioner}

    @torch.no_grad()
    def velocity(self):
        latents, sigma, context = make_inputs(CONFIG)
        image = torch.cat([latents[:, :, None], torch.zeros(2, 1, 1, *latents.shape[2:])], 1)
        return self.transformer(image, sigma, context).sample[:, :, 0]

    @torch.no_grad()
    def text_rows(self):
        ids, mask, states, source_mask = make_text_inputs()
        # Theirs is padded with zero rows.
        return self.text_conditioner(states, ids, mask, source_mask)[:, : ids.shape[1]]


class Ours:
    """Our two models with a random LoRA whose alpha is not its rank."""

    def __init__(self, **options):
        self.dit = make_dit(CONFIG)
        self.adapter = load_llm_adapter(adapter_weights(), dtype=torch.float32)
        self.network = add_lora(self.dit, llm_adapter=self.adapter, rank=4, alpha=3.0, **options)
        generator = torch.Generator().manual_seed(4)
        flat = self.network.flat
        flat.copy_(0.2 * torch.randn(flat.shape, generator=generator))

    @torch.no_grad()
    def velocity(self):
        return self.dit(*make_inputs(CONFIG))

    @torch.no_grad()
    def text_rows(self):
        return self.adapter(*make_text_inputs())


def assert_equal_but_not_plain(found, expected, plain):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"include_patterns": [".*"]},
        {"reg_dims": {r".*\.q_proj": 2, ".*layer1": 7, r"llm_adapter\..*": 3}},
    ],
    ids=["default modules", "all modules", "several ranks"],
)
def test_diffusers_computes_as_we_do(tmp_path, form, options):
    ours, theirs = Ours(**options), Pipeline()
    plain = theirs.velocity(), theirs.text_rows()
    path = tmp_path / "lora.safetensors"
    ours.network.save(path, **form, metadata={"ss_steps": "1", "modelspec.title": "x"})
    theirs.load_lora_weights(str(path))
    assert_equal_but_not_plain(theirs.velocity(), ours.velocity(), plain[0])
    assert_equal_but_not_plain(theirs.text_rows(), ours.text_rows(), plain[1])
    theirs.transformer.disable_lora()
    torch.testing.assert_close(theirs.velocity(), plain[0])
    ours.network.remove()
    torch.testing.assert_close(ours.velocity(), plain[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
@pytest.mark.parametrize("part", ["transformer", "text_conditioner"])
def test_a_file_with_one_part_leaves_the_other_model(tmp_path, form, part):
    dit_only = part == "transformer"
    ours, theirs = Ours(exclude_patterns=[r"llm_.*" if dit_only else r"blocks.*"]), Pipeline()
    plain = theirs.velocity(), theirs.text_rows()
    ours.network.save(tmp_path / "lora.safetensors", **form)
    theirs.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert torch.equal(theirs.velocity(), plain[0]) != dit_only
    assert torch.equal(theirs.text_rows(), plain[1]) == dit_only
    torch.testing.assert_close(theirs.velocity(), ours.velocity(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.text_rows(), ours.text_rows(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_the_lora_scale_is_our_multiplier(tmp_path, form):
    ours, theirs = Ours(), Pipeline()
    ours.network.save(tmp_path / "lora.safetensors", **form)
    theirs.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="style")
    theirs.transformer.set_adapters(["style"], [0.5])
    ours.network.multiplier = 0.5
    torch.testing.assert_close(theirs.velocity(), ours.velocity(), atol=1e-4, rtol=1e-4)


def test_a_file_with_alpha_is_refused_by_diffusers(tmp_path):
    """The reason for folding: diffusers takes no file whose keys are not all of matrices."""
    path, theirs = tmp_path / "lora.safetensors", Pipeline()
    Ours().network.save(path, "comfyui")
    plain = theirs.velocity()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        theirs.load_lora_weights(str(path))
    assert torch.equal(theirs.velocity(), plain)


def test_kohya_names_are_passed_over_by_diffusers(tmp_path):
    """The reason for converting: nothing is loaded, and nothing is said."""
    path, theirs = tmp_path / "lora.safetensors", Pipeline()
    Ours().network.save(path, "kohya")
    plain = theirs.velocity()
    theirs.load_lora_weights(str(path))
    assert torch.equal(theirs.velocity(), plain)


def test_both_forms_mean_the_same_to_diffusers(tmp_path):
    network, states = Ours(include_patterns=[".*"]).network, []
    for index, form in enumerate(FORMS):
        path = tmp_path / f"{index}.safetensors"
        network.save(path, **form)
        states.append(loaders.AnimaLoraLoaderMixin.lora_state_dict(str(path)))
    assert states[0].keys() == states[1].keys() == load_file(tmp_path / "0.safetensors").keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("blocks", [28, 40])
def test_every_diffusers_name_is_a_module_of_its_models(blocks):
    with torch.device("meta"):
        models = {
            "transformer": make_transformer(dataclasses.replace(CONFIG, num_blocks=blocks)),
            "text_conditioner": make_conditioner(dataclasses.replace(TINY_ADAPTER, layers=6)),
        }
    theirs = {
        f"{part}.{name}"
        for part, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    ours = {names.from_dialect(name, "diffusers") for name in theirs}
    assert None not in ours and len(ours) == len(theirs) == 16 * blocks + 6 + 61
