"Packaging: everything is read from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {
    k.removesuffix("_requirements"): v.split()
    for k, v in cfg.items()
    if k.endswith("_requirements")
}
extras["dev"] = sorted(
    {
        req
        for name, reqs in extras.items()
        if name not in ("gpu", "flash", "serve", "demo", "ray")
        for req in reqs
    }
)  # no use without GPUs; compiled for minutes; 98 MB; 200 MB

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["cmixtral_nb", "cmixtral_nb.*"]),
    include_package_data=True,
    package_data={"cmixtral_nb": ["data/*", "recipes/*.toml", "py.typed"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": ["cmixtral_nb=cmixtral_nb._modidx:d"],
    },
    zip_safe=False,
)
