"""quantise_gguf.py IN OUT: a GGUF file of 16 bits in 4 (Q4_K_M), by llama.cpp's own quantiser."""

import sys

import llama_cpp


def main(source, target):
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    return llama_cpp.llama_model_quantize(source.encode(), target.encode(), how)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
