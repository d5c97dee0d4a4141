"""A checkpoint as a model on Hugging Face's Hub: the work behind `launch/export.py --push`.

Everything that the Hub can refuse is asked before the export is written. The files then go in one
commit; large ones are sent first, and the Hub keeps them by their content, so that a push that was
killed goes on with the same command.
"""

import argparse
import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from aclip.cli import text_table
from aclip.errors import ConfigError, NotWritten
from aclip.files import appearing_folder, cache_folder, make_folder, remove_leftovers, writing
from aclip.lock import claim, release
from aclip.weights import hub
from aclip.weights.card.options import NO_OPTIONS, CardOptions, check_options
from aclip.weights.export import check_out
from aclip.weights.first_look import find_checkpoint
from aclip.weights.hub import HubName

KINDS = ("dataset", "space")
"""What else than a model a name on the Hub may stand for."""


def push(arguments: argparse.Namespace, card: CardOptions = NO_OPTIONS) -> None:
    """Runs `launch/export.py --push` with its parsed arguments.

    Args:
        card: what the user says for the card.

    Raises:
        ConfigError: no such checkpoint or model, --out holds something else, the format can't hold
            the towers, the card's licence or picture can't be used, or the Hub refuses.
        NotWritten: the export can't be written, or the Hub did not take all of it.
    """
    name = _read_name(arguments.push, arguments.revision)
    out = Path(arguments.out) if arguments.out else None
    is_filled = out is not None and out.is_dir() and any(out.iterdir())
    if out is not None and not is_filled:
        check_out(out)
    find_checkpoint(arguments.checkpoint, arguments.model)
    check_options(card)
    if not arguments.dry_run:
        _prepare(name, arguments.private)
    card = replace(card, repo=name.repository)
    with _written(arguments, card, out, is_filled, name) as (folder, model, advice):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        paths = {path.relative_to(folder).as_posix(): path for path in files}
        sizes = {shown: path.stat().st_size for shown, path in paths.items()}
        rows = [(shown, f"{size:,}", "bytes") for shown, size in sizes.items()]
        where = f"{name.page}, branch {name.revision or hub.MAIN}"
        if arguments.dry_run:
            print(f"{text_table(rows)}\nwould be sent to {where}; nothing was", flush=True)
            return
        print(f"{text_table(rows)}\ngo to {where}", flush=True)
        page = _send(name, paths, f"Upload the {model} for {arguments.format}")
    print(f"the {model} is at {page}\n{advice}", flush=True)


def _read_name(repository: str, revision: str | None) -> HubName:
    at = "" if revision is None else f"@{revision}"
    try:
        name = hub.read_name(f"{repository}{at}")
    except ValueError:
        option = (
            f"--push is {repository}{'' if revision is None else f' and --revision {revision}'}"
        )
        raise ConfigError(
            f"{option}, which is no name on the Hub; write --push OWNER/NAME, and a branch as "
            "--revision"
        ) from None
    if "@" in repository:
        raise ConfigError(f"--push is {repository}; give the part behind @ as --revision")
    return HubName(name.repository, None if revision == hub.MAIN else revision)


def _prepare(name: HubName, private: bool) -> None:
    """Makes sure that the Hub will take the files; makes the repository where there is none.

    Raises:
        ConfigError: it will not; says why.
    """
    problem = f"--push is {name.repository}"
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"{problem}, but nobody is logged in to the Hub; run hf auth login, or set HF_TOKEN"
        )
    if not hub.is_reachable():
        raise ConfigError(f"{problem}, but {hub.unreachable()}; try again where it can be")
    api = HfApi()
    with _refusing(name):
        exists = _may_write(api, name.repository)
        branches = [hub.MAIN]
        if exists:
            if private and not api.model_info(name.repository).private:
                raise ConfigError(
                    f"{problem}, which everybody can read already, but --private is given; make it "
                    f"private in its settings at {name.page}, or leave --private out"
                )
            branches = [each.name for each in api.list_repo_refs(name.repository).branches]
        else:
            # The Hub allows it, but who gives such a name has most likely mistyped it.
            kinds = [kind for kind in KINDS if api.repo_exists(name.repository, repo_type=kind)]
            if kinds:
                raise ConfigError(
                    f"{problem}, which is a {kinds[0]} on the Hub; give the model another name"
                )
        if name.revision and name.revision not in branches:
            raise ConfigError(
                f"--revision is {name.revision}, but {name.page} has no such branch "
                f"({', '.join(branches)}); make it first, or leave --revision out"
            )
        if not exists:
            api.create_repo(name.repository, private=private or None)


def _may_write(api: HfApi, repository: str) -> bool:
    """Whether there is such a model, which may be written; False if there is none."""
    try:
        api.auth_check(repository, write=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return False
    return True


@contextmanager
def _refusing(name: HubName) -> Iterator[None]:
    """Turns what the Hub refuses into a ConfigError, and a lost connection into NotWritten."""
    problem = f"--push is {name.repository}, but {hub.endpoint()}"
    try:
        yield
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            found = "does not know your token (401); run hf auth login, or correct HF_TOKEN"
        elif status == 403:
            found = (
                "does not let your token write there (403); give a name of your own or of your "
                "organisation's, and a token with the right to write"
            )
        elif status < 500 and status != 429:
            found = f"refuses it with status {status} ({_said(error)})"
        else:
            raise NotWritten(
                f"{problem} answers with status {status}; the same command goes on later"
            ) from None
        raise ConfigError(f"{problem} {found}") from None
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{problem} can't be given it ({said}); correct that") from None
    # What the client raises for a lost connection has several classes. Only the kind is shown,
    # since the text may hold addresses with signatures.
    except (HTTPError, OSError, RuntimeError) as error:
        raise NotWritten(
            f"{problem} did not take all of it ({type(error.__cause__ or error).__name__}); the "
            "same command goes on, and does not send again what has arrived"
        ) from None


def _said(error: HfHubHTTPError) -> str:
    return " ".join((error.server_message or error.response.reason_phrase).split())


@contextmanager
def _written(
    arguments: argparse.Namespace,
    card: CardOptions,
    out: Path | None,
    is_filled: bool,
    name: HubName,
) -> Iterator[tuple[Path, str, str]]:
    """Yields the export's folder, which model it holds, and how to load it from the Hub.

    Without --out the folder is one of aclip's cache, and goes afterwards. With an --out that holds
    the very same export already, as a push leaves it that was killed, that one is taken.
    """
    # Imported here: the towers take seconds, which no wrong input should cost.
    from aclip.weights.card.card import write_card
    from aclip.weights.checkpoint_weights import load_checkpoint_weights
    from aclip.weights.tensors_file import writing_tensors
    from aclip.weights.write_export import write_export

    weights = load_checkpoint_weights(arguments.checkpoint, arguments.model)

    def fill(folder: Path) -> str:
        with writing_tensors(folder):
            advice = write_export(folder, name, arguments.format, weights)
        write_card(folder, arguments.format, weights, card)
        return advice

    if out is not None and not is_filled:
        with appearing_folder(out) as partial:
            advice = fill(partial)
        yield out, weights.model, advice
        return
    place = cache_folder() / "push" / name.repository.replace("/", "--")
    make_folder(place)
    claim(place, "the folder of --push", "a push")
    try:
        remove_leftovers(place)
        folder = place / f"export.{os.getpid()}.tmp"
        with writing(folder):
            folder.mkdir()
            advice = fill(folder)
        if is_filled and not _are_equal(folder, out):
            raise ConfigError(
                f"--out is {out}, which is not empty and holds other files than this export; give "
                "a new folder"
            )
        yield out if is_filled else folder, weights.model, advice
    finally:
        shutil.rmtree(place, ignore_errors=True)
        release(place)


def _are_equal(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names = [
        sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, other)
    ]
    files = [name for name in names[0] if (one / name).is_file()]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, files, shallow=False)[1:])


def _send(name: HubName, paths: dict[str, Path], message: str) -> str:
    """Sends files by their paths in the repository, as one commit; returns the commit's page.

    Raises:
        ConfigError, NotWritten: see `_refusing`.
    """
    # Not upload_folder, which may split what it sends into several commits.
    with _refusing(name):
        commit = HfApi().create_commit(
            name.repository,
            [CommitOperationAdd(shown, str(path)) for shown, path in paths.items()],
            commit_message=message,
            revision=name.revision,
        )
    return commit.commit_url
