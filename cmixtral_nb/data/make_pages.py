"""Makes nbdev's pages in _proc, for `cmixtral docs`: run in a checkout, in a process of its own.

nbdev starts workers, so this must be a file with a main guard. Two things of nbdev are changed:
an annotation that names a type of a library which is imported only where it is used stays a name,
and each page begins in the checkout, though the chapter before it went elsewhere.
"""

import gc
import os

import fastcore.docments as docments
import nbdev.serve_drv as driver
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

strict_signature, process_page, root = docments.signature, driver.main, os.getcwd()


def signature(function, **kwargs):
    try:
        return strict_signature(function, **kwargs)
    except NameError:
        return strict_signature(function)


def main(args):
    os.chdir(root)
    return process_page(args)


docments.signature, driver.main = signature, main

if __name__ == "__main__":
    refresh_quarto_yml()
    proc_nbs(n_workers=0, force=True)
    gc.freeze()  # the shell of each notebook collects garbage as it ends: a minute for all
