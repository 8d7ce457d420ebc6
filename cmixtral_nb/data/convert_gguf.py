"""convert_gguf.py CONVERTER RULE ...: llama.cpp's converter, told which of its rules cuts words.

By itself it looks the rule up by the ids of a check text; those of an extended tokenizer are in no
table. What follows RULE are the converter's own arguments.
"""

import importlib.util
import sys
from pathlib import Path

LOOK_UP = "get_vocab_base_pre"  # its method that returns the name of the rule


def load(converter):
    "The converter as a module, and all that it imports"
    sys.path.insert(0, str(Path(converter).parent))
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", converter)
    if spec is None or spec.loader is None:
        sys.exit(f"{converter} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def classes_that_look_up():
    "Classes with the method, wherever this version of llama.cpp keeps them"
    for module in list(sys.modules.values()):
        for value in list(vars(module).values()):
            if isinstance(value, type) and LOOK_UP in vars(value):
                yield value


def main(converter, rule, *arguments):
    sys.argv = [converter, *arguments]
    module = load(converter)
    found = {*classes_that_look_up()}
    if not found:
        sys.exit(f"{converter} has no {LOOK_UP}, so that its rule cannot be named")
    for one in found:
        setattr(one, LOOK_UP, lambda self, tokenizer: rule)
    module.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
