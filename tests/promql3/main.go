// Runs the promql_expr_test sections of promtool test files with the engine of Prometheus 3, whose
// ranges exclude their left end. Debian's promtool has the engine of Prometheus 2; to build the one
// of Prometheus 3 takes many times as long as this program.
package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb"
	"gopkg.in/yaml.v3"
)

type file struct {
	Tests []struct {
		Name        string
		Interval    model.Duration
		InputSeries []struct{ Series, Values string } `yaml:"input_series"`
		Expressions []struct {
			Expr     string
			EvalTime model.Duration `yaml:"eval_time"`
			Expected []struct {
				Labels string
				Value  float64
			} `yaml:"exp_samples"`
		} `yaml:"promql_expr_test"`
	}
}

func main() {
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute})
	failed, evaluated := 0, 0
	for _, path := range os.Args[1:] {
		content, err := os.ReadFile(path)
		must(err)
		var tests file
		must(yaml.Unmarshal(content, &tests))
		for _, test := range tests.Tests {
			db := open()
			head := db.Appender(context.Background())
			for _, series := range test.InputSeries {
				load(head, series.Series, series.Values, time.Duration(test.Interval))
			}
			must(head.Commit())
			for _, expression := range test.Expressions {
				at := time.UnixMilli(0).Add(time.Duration(expression.EvalTime))
				query, err := engine.NewInstantQuery(context.Background(), db, nil, expression.Expr, at)
				must(err)
				vector, err := query.Exec(context.Background()).Vector()
				must(err)
				evaluated++
				same := len(vector) == len(expression.Expected)
				for i := 0; same && i < len(vector); i++ {
					wanted, err := parser.ParseMetric(expression.Expected[i].Labels)
					must(err)
					same = labels.Equal(vector[i].Metric, wanted) &&
						math.Abs(vector[i].F-expression.Expected[i].Value) < 1e-6
				}
				if !same {
					failed++
					fmt.Printf("%s, %q at %s: got %v, expected %v\n", path, test.Name,
						expression.EvalTime, vector, expression.Expected)
				}
			}
			must(db.Close())
		}
	}
	fmt.Printf("%d expressions evaluated, %d failed\n", evaluated, failed)
	if failed > 0 || evaluated == 0 {
		os.Exit(1)
	}
}

func open() *tsdb.DB {
	dir, err := os.MkdirTemp("", "promql3")
	must(err)
	db, err := tsdb.Open(dir, nil, nil, tsdb.DefaultOptions(), nil)
	must(err)
	return db
}

func load(head storage.Appender, series, values string, interval time.Duration) {
	metric, samples, err := parser.ParseSeriesDesc(series + " " + values)
	must(err)
	for i, sample := range samples {
		if !sample.Omitted {
			_, err := head.Append(0, metric, int64(i)*interval.Milliseconds(), sample.Value)
			must(err)
		}
	}
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}
