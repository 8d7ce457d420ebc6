"""convert_gguf.py CONVERTER RULE ...: llama.cpp's converter, without code of the model's folder.

For some families it asks transformers to run such code, which is refused here. RULE says which of
llama.cpp's rules cuts words: by itself it looks that up by the ids of a check text, and those of
an extended tokenizer are in no table; with "-" it does. What follows are the converter's own
arguments.
"""

import importlib.util
import sys
from pathlib import Path

import transformers

LOOK_UP = "get_vocab_base_pre"  # its method that returns the name of the rule
LOADERS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")


def trust_nobody():
    "Let transformers load no class from a model's folder, whatever it is asked"
    for name in LOADERS:
        loader = getattr(transformers, name)
        loader.from_pretrained = untrusting(loader.from_pretrained)


def untrusting(load):
    "A function that loads with transformers' own classes alone"

    def loaded(*arguments, **options):
        return load(*arguments, **{**options, "trust_remote_code": False})

    return loaded


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


def name_rule(converter, rule):
    "Let the converter take a rule instead of looking it up"
    found = {*classes_that_look_up()}
    if not found:
        sys.exit(f"{converter} has no {LOOK_UP}, so that its rule cannot be named")
    for one in found:
        setattr(one, LOOK_UP, lambda self, tokenizer: rule)


def main(converter, rule, *arguments):
    sys.argv = [converter, *arguments]
    trust_nobody()
    module = load(converter)
    if rule != "-":
        name_rule(converter, rule)
    module.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
