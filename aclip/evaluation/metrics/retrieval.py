"""Image-text retrieval from embeddings: a pure function on tensors, no model and no data."""

from torch import Tensor

from aclip.evaluation.metrics.ranking import MAX_SCORES, rank_answers, share_within


def retrieval_recall(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_of_text: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    max_scores: int = MAX_SCORES,
) -> dict[str, float]:
    """Shares of queries that have a right answer among their k nearest candidates.

    Image to text, any of an image's captions is right; text to image, its one image. Equal
    similarities are ordered by index (ranking.py). With 2 images and 4 captions, two for each,
    image_of_text is `[0, 0, 1, 1]`. Take the similarities

                    text 0  text 1  text 2  text 3
        image 0       0.1     0.5     0.9     0.2
        image 1       0.3     0.2     0.8     0.1

    Image 0 finds text 2 first, which is wrong, image 1 finds text 2, which is right: image to text
    R@1 is 1/2. Texts 0 to 3 find images 1, 0, 0, 0: text to image R@1 is 1/4.

    Args:
        image_embeds: (n, E) float, L2-normalised.
        text_embeds: (m, E) float, L2-normalised.
        image_of_text: (m,) int64, the row of each text's image.
        ks: the k reported.
        max_scores: similarities held at a time; n x m of them never exist at once.

    Returns:
        `image_to_text_r{k}` and `text_to_image_r{k}` for each k, in [0, 1].
    """
    images = image_of_text.new_tensor(range(len(image_embeds)))
    ranks = {
        "image_to_text": rank_answers(image_embeds, text_embeds, images, image_of_text, max_scores),
        "text_to_image": rank_answers(text_embeds, image_embeds, image_of_text, images, max_scores),
    }
    return {
        f"{direction}_r{k}": share_within(rank, k) for direction, rank in ranks.items() for k in ks
    }
