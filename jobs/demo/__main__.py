import sys

from jobs.demo.chain import main

sys.exit(main())
