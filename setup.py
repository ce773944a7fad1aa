"Package metadata, read from `settings.ini`."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters='=')
parser.read('settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
      author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
      long_description=Path('README.md').read_text(encoding='utf-8') if Path('README.md').exists() else '',
      long_description_content_type='text/markdown', license='Apache-2.0', keywords=cfg['keywords'],
      packages=find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']), zip_safe=False,
      package_data={cfg['lib_path']: ['py.typed', 'models/pocket/*']},
      python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
      extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'lab', 'peers', 'prefer', 'generation', 'sweep', 'trackers')},
      entry_points={'console_scripts': cfg['console_scripts'].split(), 'fine_tune_llm.panels': cfg['panels'].split(),
                    'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]})
