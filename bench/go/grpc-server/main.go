// Command grpc-server is grpc-go with go-grpc-middleware's Prometheus interceptors: Place as
// order-service answers it, without a store.
package main

import (
	"context"
	"log"
	"net"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"order-service-peers/orders"
	"order-service-peers/place"
)

type server struct {
	orders.UnimplementedOrderServiceServer
}

func (server) Place(ctx context.Context, request *orders.PlaceRequest) (*orders.PlaceResponse, error) {
	quantity := uint32(1)
	if request.Quantity != nil {
		quantity = *request.Quantity
	}
	order, err := place.New(request.ProductId, quantity)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	headers := metadata.Pairs("x-request-id", place.RequestID(), "x-served-by", place.ServedBy)
	if err := grpc.SetHeader(ctx, headers); err != nil {
		return nil, err
	}
	return &orders.PlaceResponse{Order: &orders.Order{
		OrderId:   order.ID,
		ProductId: order.Product,
		Quantity:  order.Quantity,
		PlacedAt:  timestamppb.New(order.At),
	}}, nil
}

func main() {
	metrics := grpcprom.NewServerMetrics(
		grpcprom.WithServerHandlingTimeHistogram(grpcprom.WithHistogramBuckets(place.Buckets)))
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics)
	listener, err := net.Listen("tcp", place.Listen(registry))
	if err != nil {
		log.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ChainUnaryInterceptor(metrics.UnaryServerInterceptor()))
	orders.RegisterOrderServiceServer(srv, server{})
	metrics.InitializeMetrics(srv)
	log.Fatal(srv.Serve(listener))
}
