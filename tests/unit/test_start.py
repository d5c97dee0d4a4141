"""What a run starts from is known before anything costs time."""

import json
import subprocess
import sys
from types import SimpleNamespace

from aclip.config.recipe_file import load_recipe
from aclip.data.shards.listing import Shard

CODE = """
import sys
from aclip.config.arguments import parse
from aclip.training.start import check_start

import aclip.training.pretrain

start = check_start(parse(sys.argv[1:]))
print([shard.num_samples for shard in start.shards], start.val_shards, start.resume_from)
print(sorted(sys.modules.keys() & {"deepspeed", "timm", "open_clip"}))
"""


def test_all_is_checked_without_deepspeed_and_without_a_tower(write_tar, encode_image, tmp_path):
    members = []
    for number in range(4):
        members.append((f"{number}.jpg", encode_image(40, 40, number)))
        members.append((f"{number}.txt", b"words"))
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    words = ["--ds_config", str(tmp_path / "ds.json"), "--output", str(tmp_path / "run")]
    words += ["--train", write_tar("a.tar", members), "train.global_batch_size=2"]
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-2:] == ["[4] [] None", "[]"], done.stderr
    assert (tmp_path / "run").is_dir()


def test_a_run_says_at_its_start_what_an_epoch_leaves_to_the_next(capsys):
    from aclip.training.checked_run import print_headline

    start = SimpleNamespace(
        recipe=load_recipe("demo", ["train.global_batch_size=8"]),
        ds_config=SimpleNamespace(dtype="fp32", micro_batch_size=8, num_micro_steps=1, stage=0),
        shards=[Shard("a.tar", 20), Shard("b.tar", 9)],
        run_folder="runs/x",
        resume_from=None,
    )
    trainer = SimpleNamespace(num_steps=7, stepper=SimpleNamespace(init_report=None))
    print_headline(start, trainer)
    assert capsys.readouterr().out.splitlines()[-1:] == [
        "an epoch of 29 samples is 3 batches of 8; the 5 left over begin the next epoch"
    ]
