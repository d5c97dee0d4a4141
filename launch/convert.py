"""Makes WebDataset shards of a data set: `python launch/convert.py folder photos --out shards`."""

import argparse

from aclip.cli import path, run_reporting_errors


def parse_arguments() -> argparse.Namespace:
    # Without abbreviations: --shard or --ou must not become an option that was not meant.
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description="Write WebDataset shards and their index from a data set as it is downloaded. "
        "A conversion that was stopped is continued by the same command.",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    processes, shards = _common_arguments()

    def add(name: str, text: str, common: argparse.ArgumentParser | None):
        parents = [] if common is None else [common]
        return sources.add_parser(
            name, help=text, description=text, parents=parents, allow_abbrev=False
        )

    source = add("yfcc15m", "YFCC100M as SLIP lays it out", shards)
    source.add_argument(
        "metadata", type=path, help="yfcc15m.pkl, or the .jsonl that yfcc-list writes"
    )
    _add_images(source, "folder that holds 00/000.zip to 99/999.zip")
    for name in ("cc3m", "cc12m"):
        source = add(name, f"{name.upper()}'s tsv and a folder of downloaded images", shards)
        source.add_argument("tsv", type=path, help="as Google publishes it")
        _add_images(source, "folder of the images")
        source.add_argument(
            "--name",
            help="an image's path in it, from {row}, {thousand} (row modulo 1000) and {crc32} "
            "(of the url) (default: as SLIP names them)",
        )
    source = add("coco", "COCO Captions", shards)
    source.add_argument("annotations", type=path, help="captions_train2017.json")
    _add_images(source, "the folder train2017")
    source = add("redcaps", "RedCaps", shards)
    source.add_argument(
        "annotations", type=path, help="folder of the annotation files, or one of them"
    )
    _add_images(source, "folder that redcaps-downloader wrote")
    source = add("folder", "a folder of images with NAME.txt or .json beside NAME.jpg", shards)
    source.add_argument("folder", type=path)
    source = add("table", "a csv, tsv, jsonl or parquet of image paths and captions", shards)
    source.add_argument("table", type=path)
    source.add_argument(
        "--images", type=path, help="folder that paths start from (default: the table's)"
    )
    source.add_argument(
        "--image-column", "--image_column", default="filepath", help="(default: filepath)"
    )
    source.add_argument(
        "--caption-column",
        "--caption_column",
        action="append",
        help="give it again for further captions (default: caption)",
    )
    source.add_argument(
        "--no-quotes", "--no_quotes", action="store_true", help="the file does not quote fields"
    )
    source.add_argument(
        "--separator",
        help="a character, or comma, tab, semicolon, pipe (default: found from the header)",
    )
    source = add("img2dataset", "img2dataset's shards: writes their sizes.json only", processes)
    source.add_argument("folder", type=path)
    source = add("word-counts", "shards: writes how often each word comes in captions", processes)
    source.add_argument(
        "shards", nargs="+", type=path, help="as for --train, or demo for the built-in scenes"
    )
    source.add_argument(
        "--captions",
        action="append",
        metavar="KEY",
        help="a key of data.captions; give it again to count further ones (default: KEY.txt and "
        "KEY.json as training reads them)",
    )
    source.add_argument(
        "--out",
        "--output",
        type=path,
        help="file to write (default: word_counts.json beside the shards)",
    )
    source = add("yfcc-list", "YFCC100M's raw metadata: writes the list for yfcc15m", None)
    source.add_argument("metadata", type=path, help="yfcc100m_dataset, plain, .bz2 or .gz")
    source.add_argument(
        "--subset", required=True, type=path, help="OpenAI's yfcc100m_subset_data.tsv(.bz2)"
    )
    source.add_argument(
        "--image-ids",
        "--image_ids",
        type=path,
        help="flickr_unique_ids.npy (default: all of the subset)",
    )
    source.add_argument(
        "--out", "--output", required=True, type=path, help="file to write, such as yfcc15m.jsonl"
    )
    return parser.parse_args()


def _common_arguments() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    processes = argparse.ArgumentParser(add_help=False)
    processes.add_argument("--processes", type=int, help="(default: one a core)")
    shards = argparse.ArgumentParser(add_help=False, parents=[processes])
    shards.add_argument(
        "--out",
        "--output",
        required=True,
        type=path,
        help="folder of the shards; new or to continue",
    )
    shards.add_argument(
        "--shard-size", "--shard_size", type=int, default=10000, help="samples (default: 10000)"
    )
    shards.add_argument(
        "--min-side",
        "--min_side",
        type=int,
        default=16,
        help="smaller images are left out (default: 16)",
    )
    shards.add_argument(
        "--short-side",
        "--short_side",
        type=int,
        help="bring larger images to this shorter side, and all upright (default: keep the bytes)",
    )
    shards.add_argument("--format", choices=["jpeg", "webp"], help="with --short-side (jpeg)")
    shards.add_argument("--quality", type=int, help="with --short-side (90)")
    return processes, shards


def _add_images(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--images", required=True, type=path, help=text)


def main() -> None:
    arguments = parse_arguments()
    # Imported here so that --help answers at once.
    from aclip.data.convert.convert import convert

    convert(arguments)


if __name__ == "__main__":
    run_reporting_errors(main)
