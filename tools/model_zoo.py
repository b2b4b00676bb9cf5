#!/usr/bin/env python
"""Write docs/model_zoo.md from the table of published checkpoints, fcos_d2/zoo/published.yaml.

python tools/model_zoo.py
python tools/model_zoo.py --costs    (print the costs of configs that the table lacks)
"""

import argparse
from pathlib import Path

from fcos_d2.analysis.model import analyze_model
from fcos_d2.zoo import DEFAULT, PUBLISHED, Published

FILE = Path(__file__).resolve().parents[1] / "docs" / "model_zoo.md"
HEAD = f"""\
# Model zoo

<!-- Made from fcos_d2/zoo/published.yaml by tools/model_zoo.py: change that file, and run it. -->

Checkpoints of FCOS, and of its [successors](successors.md), on COCO that others have trained and
published, by name. Each is fetched once from where its makers keep it, checked, and converted:

```
fcos predict --model fcos_R_50_FPN_1x --input photo.jpg --output detections
python train_net.py --config-file configs/COCO-Detection/fcos_R_50_FPN_2x.yaml --eval-only \\
    MODEL.WEIGHTS adelaidet://FCOS_MS_R_50_2x
```

- `--model` takes an address of the tables below, or the name of a config. Of a config's checkpoints
  it takes the one with the highest AP, among those that may be used commercially if there are any.
  Without `--model`, `fcos predict` takes `{DEFAULT}`.
- `MODEL.WEIGHTS` takes an address in training, evaluation, prediction and export. In training, the
  class layer starts anew where your classes differ. If the config computes something else than the
  checkpoint needs, an error says which keys to add.
- In Python, `fcos_d2.model_zoo.get_config(name, trained=True)` is the config that is right for a
  checkpoint, and `fcos_d2.model_zoo.get(name, trained=True)` the model with its weights.
- `fcos convert ADDRESS OUT.pth` writes the converted checkpoint as a file.
- Files lie in Detectron2's cache (`$FVCORE_CACHE`, or `~/.torch/iopath_cache`). Without a network,
  the error says where to put the file by hand.
- AP is the box AP that the makers report, on val2017 (the original FCOS: minival, the same images),
  without test-time augmentation. It was **not measured here**, and **no published file was tried
  here**: the conversion is tested on files of the same layout. GFLOPs are billions of multiply-adds
  for an image of 800 x 1280.
- The licences are those of the repositories. The models of AdelaiDet and of the original FCOS are
  for **non-commercial use**, and the log says so when one is fetched.
"""


def page() -> str:
    parts = [HEAD]
    for source in dict.fromkeys(row.source for row in PUBLISHED.values()):
        rows = [row for row in PUBLISHED.values() if row.source == source]
        first = rows[0]
        pages = " and ".join(f"[here]({page})" for page in dict.fromkeys(r.ap_from for r in rows))
        parts.append(
            f"\n## {first.title}\n\n{first.licence}. AP on {first.ap_split}, from {pages}.\n\n"
            "| `MODEL.WEIGHTS` | config | box AP | parameters (M) | GFLOPs | file |\n"
            "| --- | --- | --- | --- | --- | --- |\n"
        )
        parts += [line(row) for row in rows]
    return "".join(parts)


def line(row: Published) -> str:
    config = f"[{Path(row.config).stem}](../configs/{row.config})"
    parameters, gflops = row.costs
    return (
        f"| `{row.address}` | {config} | {row.ap:.1f} | {parameters:.1f} | {gflops:.0f} | "
        f"[download]({row.url}) |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--costs", action="store_true", help="count what the table lacks")
    args = parser.parse_args()
    if args.costs:
        for config, row in {x.config: x for x in PUBLISHED.values() if not x.costs}.items():
            found = analyze_model(row.cfg(), 800, 1280)
            costs = [round(found.parameters / 1e6, 1), round(found.multiply_adds / 1e9, 1)]
            print(f'  "{config}": {costs}', flush=True)
    else:
        FILE.write_text(page())
        print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
