"""Hugging Face's Hub: names of models there, whether it answers, and what it refuses in words.

Imports neither torch nor the Hub's client, whose half second only a name of the Hub costs.
"""

import re
import ssl
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass

import huggingface_hub.constants

HUB = "hf-hub:"
"""In front of the name of a model there, as open_clip and timm write it too."""
MAIN = "main"
PATIENCE = 2.0
"""Seconds in which the Hub has to answer."""
_REPOSITORY = re.compile(r"\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A model on the Hub.

    Attributes:
        repository: OWNER/NAME.
        revision: a branch, a tag or a commit; None for the main branch.
    """

    repository: str
    revision: str | None = None

    @property
    def is_commit(self) -> bool:
        """Whether it always stands for the same files."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        return f"{endpoint()}/{self.repository}"

    def __str__(self) -> str:
        return f"{HUB}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def read_name(text: str) -> HubName:
    """Reads `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME@REVISION`.

    Raises:
        ValueError: it is no such name; the message ends a sentence.
    """
    repository, at, revision = text.removeprefix(HUB).partition("@")
    is_name = _REPOSITORY.fullmatch(repository) and not re.search(r"--|\.\.|\.git$", repository)
    if not is_name or (at and not re.fullmatch(r"[\w./-]+", revision)):
        raise ValueError(
            f"is no name of a model on the Hub; write {HUB}OWNER/NAME, or {HUB}OWNER/NAME@REVISION"
        )
    return HubName(repository, revision or None)


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or Hugging Face's own."""
    return huggingface_hub.constants.ENDPOINT


def is_reachable() -> bool:
    """Whether the Hub answers in PATIENCE; its client by itself tries for a minute."""
    return not huggingface_hub.constants.HF_HUB_OFFLINE and _answers(endpoint())


def unreachable() -> str:
    """Why nothing can be asked, in words."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to ask the Hub"
    return f"{endpoint()} can't be reached"


def in_words(error: Exception, name: HubName) -> str:
    """What the Hub's client has raised about a model, in words that follow its name and `which`."""
    # Imported here, see above.
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"is open to whom its owner lets in; ask for that at {name.page}, and log in"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {name.revision}; give a branch, a tag or a commit of {name.page}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and huggingface_hub.get_token() is not None:
        return (
            f"{endpoint()} does not let you read, since it does not know your token (401); run "
            "hf auth login, or correct HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"is no model on {endpoint()}, or one that you may not read; check the name, or log in "
            "with hf auth login"
        )
    if status is not None:
        return f"{endpoint()} refuses with status {status}; check HF_ENDPOINT, or try again later"
    return f"can't be fetched from {endpoint()} ({' '.join(str(error).split())}); try again later"


def _answers(address: str) -> bool:
    answers = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE)
        except urllib.error.HTTPError:
            answers.append(True)
        except urllib.error.URLError as error:
            # Somebody is there; whether the certificate will do is for the hub's client to say.
            answers.extend([True] if isinstance(error.reason, ssl.SSLError) else [])
        except (OSError, ValueError):
            pass
        else:
            answers.append(True)

    # A thread, since asking a name server knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)
