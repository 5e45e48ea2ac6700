"""Print what pyproject.toml asks for: `python requirements.py service` for the SDK and one extra.

An image installs the dependencies before it has our code, so that a change of the code does not
install them anew.
"""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")
