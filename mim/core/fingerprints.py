"""Whether two runs saw the same images, from what they kept of them."""

from itertools import zip_longest


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
