"""Whether two runs saw the same images, from what they kept of them."""

from itertools import zip_longest

from mim.core.errors import setting_error


def check_images(requested: str | None, present: str, way_out: str = "") -> None:
    """Raise a ``UserError`` if ``data.fingerprint`` asks for other images than there are."""
    if requested is not None and not same_images(requested, present):
        reason = f"asks for other images than there are, which have {present}"
        raise setting_error("data.fingerprint", requested, reason + way_out)


def same_images(saved: str, seen: str) -> bool:
    """Whether two fingerprints, of splits joined by hyphens, name the same images.

    Runs of earlier versions kept no digest of what images hold; theirs is compared as far as it
    goes.
    """
    for one, other in zip_longest(saved.split("-"), seen.split("-"), fillvalue=""):
        (ids, _, content), (other_ids, _, other_content) = one.partition("."), other.partition(".")
        if ids != other_ids or (content and other_content and content != other_content):
            return False
    return True
