"""Print what pyproject.toml asks for: `python requirements.py service otel` for the SDK and extras.

An image installs the dependencies before it has our code, so that a change of the code does not
install them anew.
"""

import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = [each for extra in sys.argv[1:] for each in project["optional-dependencies"][extra]]
print(*project["dependencies"], *extras, sep="\n")
