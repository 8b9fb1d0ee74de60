"""`mmn edit fit|show|apply|merge`: what the chapter on editing does, on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmn.arguments import a_path, at_least
from mmn.errors import MmnError
from mmn.paths import in_utf8, whole

if TYPE_CHECKING:
    from PIL import Image

    from mmn.vlm import VLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands of `mmn edit`, and their options."""
    commands = parser.add_subparsers(dest="what", metavar="fit|show|apply|merge", required=True)
    fit = commands.add_parser("fit", help="find an edit and write it to a file")
    fit.add_argument("source", help="the noun to be replaced")
    fit.add_argument("target", nargs="?", default="", help="the noun in its place (default: leave the source out)")
    fit.add_argument("--pictures", type=a_path, help="folder of pictures that show the source (default: synthetic scenes)")
    fit.add_argument("--keep", type=a_path, help="folder of pictures whose captions shall stay (default: synthetic scenes)")
    fit.add_argument("--count", type=at_least(1), default=12, help="pictures of each kind at most (default: %(default)s)")
    fit.add_argument("--top-k", type=at_least(1), help="neurons to change (default: 20, of the better edit 40)")
    fit.add_argument("--way", choices=("gradient", "closed", "better"), default="gradient", help="default: %(default)s")
    fit.add_argument("--seed", type=at_least(0), default=0, help="of synthetic scenes (default: %(default)s)")
    fit.add_argument("--out", type=a_path, required=True, help="file of the edit, *.safetensors")
    show = commands.add_parser("show", help="print what an edit's file holds; needs no model")
    show.add_argument("edits", nargs="+", type=a_path, metavar="EDIT")
    show.add_argument("--json", action="store_true", help="print JSON")
    apply = commands.add_parser("apply", help="caption a picture without and with edits")
    apply.add_argument("edits", nargs="+", type=a_path, metavar="EDIT")
    apply.add_argument("--picture", required=True, help="a picture file; a number draws that synthetic scene")
    apply.add_argument("--how", choices=("auto", "weights", "hook"), default="auto", help="default: %(default)s")
    merge = commands.add_parser("merge", help="write a whole checkpoint with the edits in its weights")
    merge.add_argument("edits", nargs="+", type=a_path, metavar="EDIT")
    merge.add_argument("--out", type=a_path, required=True, help="folder of the new checkpoint; must not exist")
    for command in (fit, apply, merge):
        command.add_argument("--model", default="tiny-llava", help="a folder or a Hugging Face name (default: %(default)s)")
        command.add_argument("--device-map", help="where the weights go, e.g. auto or cuda (default: the CPU)")
        dtype = "auto" if command is merge else "float32"
        command.add_argument("--dtype", default=dtype, help="e.g. bfloat16 (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """`mmn edit`. Raises MmnError for bad input."""
    return {"fit": _fit, "show": _show, "apply": _apply, "merge": _merge}[args.what](args)


def _fit(args: argparse.Namespace) -> int:
    import mmn
    from mmn import editors
    from mmn.edit import located

    if args.out.is_dir():
        raise MmnError(f"{args.out} is a folder: give --out the name of a file.")
    if not args.out.parent.is_dir():
        raise MmnError(f"There is no folder {args.out.parent} to write the edit to: make it, or choose another --out.")
    vlm = mmn.load(args.model, device_map=args.device_map, dtype=args.dtype)
    texts: Sequence[str] = ()
    better = dict(editors.BETTER)
    if args.pictures:
        shown = _pictures(args.pictures, args.count)
        keep = _pictures(args.keep, args.count) if args.keep else []
    else:
        job = editors.task(args.source, args.target or _another(args.source), fit=args.count, keep=args.count, seed=args.seed)
        shown, keep, texts = job.pictures, job.others, job.texts
        keep = _pictures(args.keep, args.count) if args.keep else keep
        better["prompt"] = job.prompts
    count = args.top_k or (editors.BETTER_K if args.way == "better" else 20)
    neurons = located(vlm, vlm.caption(shown), args.source, count)
    if args.way == "closed":
        edit = mmn.Edit.closed_form(vlm, shown, args.source, args.target, neurons, keep=keep)
    else:
        settings = {**better, "texts": texts} if args.way == "better" else {}
        if args.way == "better" and not (keep or texts):
            raise MmnError("The better edit needs pictures whose captions shall stay: give a folder with --keep.")
        edit = mmn.Edit.fit(vlm, shown, args.source, args.target, neurons, keep=keep, **settings)
    edit.save(args.out)
    print(edit)
    print(f"Written to {args.out}: {args.out.stat().st_size / 1e3:.0f} kB")
    return 0


def _another(source: str) -> str:
    from mmn.scenes import CONCEPTS

    return next(name for name in CONCEPTS if name != source)


def _pictures(folder: Path, count: int) -> list[Image.Image]:
    from mmn import chapters

    return chapters.opened(str(folder), count)[0]


def _show(args: argparse.Namespace) -> int:
    import mmn

    for path in args.edits:
        edit = mmn.Edit.load(path)
        if args.json:
            neurons = [list(neuron) for neuron in edit.neurons]
            about = {"source": edit.source, "target": edit.target, "model_hash": edit.model_hash, "norm": edit.norm}
            print(json.dumps({**about, "neurons": neurons, "report": edit.report}, indent=1))
        else:
            print(edit)
            print("  neurons:", ", ".join(map(str, edit.neurons[:10])) + (", ..." if len(edit.neurons) > 10 else ""))
            for key in ("way", "pictures", "kept", "steps", "probability", "seconds"):
                if key in edit.report:
                    print(f"  {key}: {edit.report[key]}")
    return 0


def _apply(args: argparse.Namespace) -> int:
    from contextlib import ExitStack

    import mmn
    from mmn import scenes

    edits = [mmn.Edit.load(path) for path in args.edits]
    image = scenes.draw(int(args.picture)).image if args.picture.isdecimal() else mmn.open_image(args.picture)
    vlm = mmn.load(args.model, device_map=args.device_map, dtype=args.dtype)
    before = vlm.caption(image, record=False).text
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(vlm, args.how))
        after = vlm.caption(image, record=False).text
    print("before:", before)
    print("after: ", after)
    return 0


def _merge(args: argparse.Namespace) -> int:
    import mmn

    edits = [mmn.Edit.load(path) for path in args.edits]
    if args.out.exists():
        raise MmnError(f"{args.out} exists: choose another --out, so that no checkpoint is overwritten.")
    vlm = mmn.load(args.model, device_map=args.device_map, dtype=args.dtype)
    merged(vlm, edits, args.out)
    lost = max(edit.lost(vlm) for edit in edits)
    print(f"Written to {args.out}; rounding to the weights' type took {lost:.1%} of the change.")
    return 0


def merged(vlm: VLM, edits: Sequence, out: Path) -> None:
    """Write a checkpoint, whole or not at all, that has some edits in its weights and needs nothing of this package.

    Raises MmnError on another model than the edits', and for weights that cannot be changed."""
    from contextlib import ExitStack

    from mmn.vlm import quiet

    with whole(out) as part, ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(vlm, "weights"))
        stack.enter_context(quiet())
        part.mkdir()
        there = stack.enter_context(in_utf8(part))
        vlm.model.save_pretrained(there)
        vlm.processor.save_pretrained(there)
