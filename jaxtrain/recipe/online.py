"""Asks the hub whether this machine may download what a recipe names."""

from collections.abc import Iterator

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] # of whichever client the hub uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from jaxtrain.recipe.data import HFDataSourceConfig
from jaxtrain.recipe.errors import Fault, show
from jaxtrain.recipe.section import path_exists
from jaxtrain.recipe.trainer import TrainerConfig

NO_REPOSITORIES = ("json", "csv", "parquet", "text", "arrow", "imagefolder", "generator")
"""Formats of `datasets` that read the files in `kwargs`."""


def find_repositories(config: TrainerConfig) -> Iterator[tuple[str, str, str]]:
    """(dotted key, kind, name) of each hub repository that a run reads."""
    for section in ("model", "tokenizer"):
        name = getattr(config, section).name_or_path
        if name and not (name.startswith("pypi:") or path_exists(name)):
            yield f"{section}.name_or_path", "model", name
    for place, source in config.data.iter_sources():
        name = source.name_or_path if isinstance(source, HFDataSourceConfig) else "text"
        if name not in NO_REPOSITORIES and not path_exists(name):
            yield f"{place}.name_or_path", "dataset", name


def check_access(config: TrainerConfig) -> tuple[str, list[Fault]]:
    """A line on what this machine may download, and a fault for each repository it may not."""
    hub = HfApi()
    available, faults = [], []
    for key, kind, name in find_repositories(config):
        if why := _why_not(hub, kind, name):
            faults.append(Fault(key, f"{show(name)} {why}"))
        else:
            available.append(f"{kind} {name}")
    found = ", ".join(available)
    return f"{found}: available from {hub.endpoint}" if found else "", faults


def _why_not(hub: HfApi, kind: str, name: str) -> str | None:
    try:
        validate_repo_id(name)
        hub.auth_check(name, repo_type=kind)
    except HFValidationError:
        return "is neither a path on this machine nor the name of a repository"
    except GatedRepoError:
        page = f"{hub.endpoint}/{'datasets/' * (kind == 'dataset')}{name}"
        return f"is gated: accept its terms at {page}, and set HF_TOKEN to a token that did"
    except RepositoryNotFoundError:
        return f"is not on {hub.endpoint}, or is private and HF_TOKEN has no access to it"
    except OfflineModeIsEnabled:
        return "cannot be checked: HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return f"cannot be downloaded: {hub.endpoint} answers {error.response.status_code}"
    except (HTTPError, OSError) as error:
        return f"cannot be reached at {hub.endpoint}: {type(error).__name__}"
    return None
