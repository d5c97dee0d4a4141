"""Retrieval recall against matrices worked out by hand, and against a plain sort."""

import pytest
import torch

from aclip.evaluation.metrics.retrieval import retrieval_recall


def recall_of(similarities, image_of_text, **kwargs):
    """Embeddings whose products are the given (images, texts) matrix: texts are its columns."""
    similarities = torch.tensor(similarities)
    images = torch.eye(len(similarities))
    return retrieval_recall(images, similarities.T, torch.tensor(image_of_text), **kwargs)


def test_the_docstring_example():
    recall = recall_of([[0.1, 0.5, 0.9, 0.2], [0.3, 0.2, 0.8, 0.1]], [0, 0, 1, 1], ks=(1, 2, 3))
    assert recall == {
        "image_to_text_r1": 1 / 2,
        "image_to_text_r2": 1.0,
        "image_to_text_r3": 1.0,
        "text_to_image_r1": 1 / 4,
        "text_to_image_r2": 1.0,
        "text_to_image_r3": 1.0,
    }


def test_any_caption_counts_and_images_have_unequally_many():
    recall = recall_of(
        [
            [0.1, 0.2, 0.3, 0.4, 0.9, 0.8],  # captions 0-3 are image 0's: best is third
            [0.9, 0.1, 0.1, 0.1, 0.8, 0.2],  # caption 4: second
            [0.0, 0.0, 0.5, 0.0, 0.0, 0.6],  # caption 5: first
        ],
        [0, 0, 0, 0, 1, 2],
        ks=(1, 2, 3),
    )
    assert [recall[f"image_to_text_r{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    # Captions find: 0 -> image 1 (own second), 1 -> 0, 2 -> 2 (own second), 3 -> 0,
    # 4 -> 0 (own second), 5 -> 0 (own second).
    assert [recall[f"text_to_image_r{k}"] for k in (1, 2, 3)] == pytest.approx([2 / 6, 1, 1])


def test_captions_need_not_be_in_the_order_of_images():
    recall = recall_of([[0.1, 0.9], [0.8, 0.2]], [1, 0], ks=(1,))
    assert recall == {"image_to_text_r1": 1.0, "text_to_image_r1": 1.0}


def test_equal_similarities_are_ordered_by_index():
    recall = recall_of([[0.5] * 4] * 3, [2, 1, 1, 0], ks=(1, 2, 3, 4))
    # Image 0's first caption is at place 3, image 1's at 1, image 2's at 0.
    assert [recall[f"image_to_text_r{k}"] for k in (1, 2, 3, 4)] == pytest.approx(
        [1 / 3, 2 / 3, 2 / 3, 1]
    )
    # Captions' images are at places 2, 1, 1, 0.
    assert [recall[f"text_to_image_r{k}"] for k in (1, 2, 3, 4)] == pytest.approx(
        [1 / 4, 3 / 4, 1, 1]
    )


def test_tied_captions_of_the_image_itself_count_for_it():
    recall = recall_of([[0.7, 0.7, 0.1], [0.2, 0.3, 0.3]], [1, 0, 1], ks=(1, 2))
    # Image 0: caption 0 (wrong) ties with its own caption 1 and comes first. Image 1: caption 1
    # (wrong) ties with its own caption 2 and comes first; so both are second.
    assert recall["image_to_text_r1"] == 0.0
    assert recall["image_to_text_r2"] == 1.0


def test_nan_similarities_are_never_right():
    recall = recall_of([[float("nan")] * 2, [float("nan")] * 2], [0, 1], ks=(1, 2))
    assert set(recall.values()) == {0.0}


def test_chunks_do_not_change_the_result_and_it_equals_a_sort():
    generator = torch.manual_seed(0)
    image_embeds = torch.nn.functional.normalize(torch.randn(23, 16, generator=generator), dim=1)
    image_of_text = torch.randint(23, (61,), generator=generator)
    noise = torch.randn(61, 16, generator=generator)
    text_embeds = torch.nn.functional.normalize(image_embeds[image_of_text] + 0.4 * noise, dim=1)

    similarities = image_embeds.double() @ text_embeds.double().T
    order = similarities.argsort(1, descending=True)
    captioned = [i for i in range(23) if (image_of_text == i).any()]
    hits = [any(image_of_text[j] == i for j in order[i, :5]) for i in captioned]
    by_sort = similarities.argsort(0, descending=True)[0] == image_of_text

    whole = retrieval_recall(image_embeds, text_embeds, image_of_text)
    assert whole["image_to_text_r5"] == pytest.approx(sum(hits) / 23)
    assert whole["text_to_image_r1"] == pytest.approx(by_sort.double().mean().item())
    for max_scores in (1, 100, 1403):
        assert (
            retrieval_recall(image_embeds, text_embeds, image_of_text, max_scores=max_scores)
            == whole
        )
