"""Fetch the published model files into a models folder, resumable, from the Hugging Face hub.

The networks come from `circlestone-labs/Anima`. Tokenizers are not in that repository: the Qwen3
one comes from `Qwen/Qwen3-0.6B-Base`; the T5 one from `google-t5/t5-base`, whose `tokenizer.json`
is the original T5 vocabulary in a form that needs no sentencepiece (`google/t5-v1_1-xxl` has the
same vocabulary as `spiece.model` only). `HF_ENDPOINT` chooses another hub, `HF_TOKEN` an account.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anima_fast.errors import UserError
from anima_fast.files import cache_home, disk_error, read_safetensors_header

REPOSITORY = "circlestone-labs/Anima"
DIT_FOLDER = "split_files/diffusion_models"
TEXT_ENCODER = "split_files/text_encoders/qwen_3_06b_base.safetensors"
VAE = "split_files/vae/qwen_image_vae.safetensors"

# Name on the command line -> file; any other name is taken as a file name of the repository.
DIT_RELEASES = {
    name: f"anima-{name}.safetensors"
    for name in (
        "base-v1.0", "aesthetic-v1.1", "aesthetic-v1.0", "turbo-v1.1", "turbo-v1.0",
        "preview3-base", "preview2", "preview",
    )
}  # fmt: skip

# Folder in the models folder -> repository and files.
TOKENIZERS = {
    "qwen3_tokenizer": (
        "Qwen/Qwen3-0.6B-Base",
        ("vocab.json", "merges.txt", "tokenizer_config.json", "config.json"),
    ),
    "t5_tokenizer": ("google-t5/t5-base", ("tokenizer.json",)),
}


# The hub's library changed its HTTP client more than once; their errors share no base class.
HTTP_CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")


@dataclass(frozen=True)
class Downloaded:
    """Where the files are; the networks are None when only tokenizers were asked for."""

    models_dir: Path
    dit: Path | None = None
    qwen3: Path | None = None
    vae: Path | None = None


def models_folder(named: str | Path | None = None) -> Path:
    """The models folder: the named one, else `models` in the program's cache folder."""
    return Path(named) if named else cache_home() / "models"


def dit_file(name: str) -> str:
    """The path in the repository of a DiT given by release or by file name."""
    file = DIT_RELEASES.get(name.removeprefix("anima-"), name)
    if not file.endswith(".safetensors"):
        raise UserError(
            f"--dit {name} is not a known release: use one of {', '.join(DIT_RELEASES)}, or a "
            ".safetensors file name of the repository"
        )
    return file if "/" in file else f"{DIT_FOLDER}/{file}"


def download_models(
    models_dir: str | Path | None = None,
    *,
    dit: str = "base-v1.0",
    tokenizers_only: bool = False,
    say: Callable[[str], object] = print,
) -> Downloaded:
    """Fetch what is missing; an interrupted download goes on where it stopped.

    Args:
        models_dir: the folder to fill (default: that of `models_folder`).
        dit: a key of `DIT_RELEASES`, or a file name of the repository.
        tokenizers_only: leave the networks out (about 5.6 GB).
        say: called with a line for each file.

    Raises `UserError` for no connection, an unknown file, a repository that asks for a login, a
    full disk, a file that arrives damaged.
    """
    folder = models_folder(models_dir)
    wanted = dit_file(dit)
    for name, (repository, files) in TOKENIZERS.items():
        for file in files:
            fetch(repository, file, folder / name, say)
    if tokenizers_only:
        return Downloaded(folder)
    paths = [fetch(REPOSITORY, file, folder, say) for file in (VAE, TEXT_ENCODER, wanted)]
    for path in paths:
        read_safetensors_header(path)
    vae, qwen3, dit_path = paths
    return Downloaded(folder, dit_path, qwen3, vae)


def fetch(repository: str, file: str, folder: Path, say: Callable[[str], object] = print) -> Path:
    """One file of a hub repository, at the same relative path below `folder`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = f"{repository}/{file}"
    try:
        path = Path(hf_hub_download(repository, file, local_dir=folder))
    except GatedRepoError as error:
        raise UserError(
            f"{repository} asks for a login: accept its terms on the website, then `hf auth login`"
        ) from error
    # A subclass of the next: the file may exist, but the hub cannot be asked.
    except LocalEntryNotFoundError as error:
        raise _unreachable(where, error) from error
    except EntryNotFoundError as error:
        raise UserError(
            f"{where} does not exist on the hub: see `anima-fast download --list`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{repository} does not exist on the hub, or needs HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused {where}: {_first_line(error)}: try again") from error
    except OSError as error:
        # Network errors carry no errno.
        if error.errno is None or isinstance(error, ConnectionError):
            raise _unreachable(where, error) from error
        raise disk_error(error, folder / file) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in HTTP_CLIENTS:
            raise
        raise _unreachable(where, error) from error
    say(f"{path} ({path.stat().st_size / 1e6:,.1f} MB)")
    return path


def _unreachable(where: str, error: Exception) -> UserError:
    from huggingface_hub import constants

    cause = error.__cause__ or error
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(cause)[:200]
    return UserError(
        f"cannot fetch {where} from {constants.ENDPOINT}: {reason}: connect and run the same "
        "command again (it goes on where it stopped), or copy the file there from another machine"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def train_command(found: Downloaded) -> str:
    """The train command for the fetched files, ready to be completed and pasted."""
    arguments = [
        f"--pretrained_model_name_or_path={shlex.quote(str(found.dit))}",
        f"--qwen3={shlex.quote(str(found.qwen3))}",
        f"--vae={shlex.quote(str(found.vae))}",
    ]
    if found.models_dir != models_folder():
        arguments.append(f"--models_dir={shlex.quote(str(found.models_dir))}")
    arguments += [
        "--dataset_config=data.toml",
        "--output_dir=output",
        "--output_name=my_lora",
        "--network_dim=16 --learning_rate=1e-4 --optimizer_type=AdamW8bit",
        "--max_train_epochs=10 --save_every_n_epochs=1 --gradient_checkpointing",
        "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk",
    ]
    return " \\\n  ".join(["anima-fast train", *arguments])
